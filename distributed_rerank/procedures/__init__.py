"""Layer 3: what one process does with one device. Many devices come in as a function argument."""
