"""Submit a command to a Ray cluster."""

from distributed_rerank.cluster.submit import main

__all__ = ["main"]
