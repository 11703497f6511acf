"""Layer 4: the same procedures on Ray. The only folder that imports ray or torch.distributed."""
