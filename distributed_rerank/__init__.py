"""Re-ranking for image retrieval: train a pairwise model on hard pairs, re-order the first `top_n` neighbours of
every query, and say with honest figures whether that was worth it. One process or a Ray cluster, the same code and
the same bits.

Layers, imports go down only: `tensors` (pure functions), `data` and `models`, `procedures` (one device), `cluster`
(Ray).
"""

__version__ = "0.1.0"
