"""A metric of your own: NDCG of the first ten places.

Put its folder on PYTHONPATH: distributed-rerank evaluate --own-metrics own_metric:ndcg ...
It is measured before and after re-ranking, with interval, and stands beside the others in metrics.json and the report.
"""

import torch
from torch import Tensor


def ndcg(is_relevant: Tensor, n_relevant: Tensor) -> Tensor:
    """One number for each query, from the right places of its list, best first, and how many there could be."""
    places = torch.arange(min(10, is_relevant.shape[1]), device=is_relevant.device)
    gains = 1 / (places + 2).double().log2()
    ideal = gains * (places < n_relevant[:, None])
    return (is_relevant[:, :10] * gains).sum(dim=1) / ideal.sum(dim=1)
