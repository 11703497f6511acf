"""Pure functions on tensors and integers: no I/O, no Ray, no global random state."""
