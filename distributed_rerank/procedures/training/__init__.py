"""Layer 3. A pairwise model from candidate lists: plan, epochs, checkpoints, and the stage that writes its folder."""
