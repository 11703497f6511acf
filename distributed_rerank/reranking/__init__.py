"""From a catalogue to rankings: first stage, pair scores, chain; with and without labels."""
