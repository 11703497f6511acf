"""Pairs to logits: plan the blocks, score them in one process, keep them in a resumable folder."""
