"""What a running process computes with and how it reports progress: device, threads, memory, progress lines."""
