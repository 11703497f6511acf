"""Folders of photos and well-known data sets, as they are, to a catalogue. Nothing here imports torch."""
