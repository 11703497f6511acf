"""Layer 3. From a catalogue to its rankings, with or without labels."""
