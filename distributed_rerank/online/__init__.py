"""One query at a time: encodings in a memory-mapped file, an answer in milliseconds, neither Ray nor result folders."""
