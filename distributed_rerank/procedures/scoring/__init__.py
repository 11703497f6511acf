"""Layer 3. Pairs to logits: the plan, the work of one process, and the resumable stage."""
