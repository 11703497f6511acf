"""Layer 1: pure functions on tensors and integers. No I/O, no Ray, no global random state."""
