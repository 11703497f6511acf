"""A catalogue and configs to a complete model folder: plan, epochs, checkpoints, model card."""
