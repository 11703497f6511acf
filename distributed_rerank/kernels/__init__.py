"""Layer 1. Functions on tensors in machine code for one kind of processor, where torch leaves much of it unused."""
