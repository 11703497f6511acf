"""A chain step of your own: photos that stand in many lists ("hubs") go down.

Put its folder on PYTHONPATH and name it in a chain: distributed-rerank evaluate --chain own_chain.json ...
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class DemoteHubs:
    """Every field is a constant of chain.json."""

    weight: float = 0.5
    """Of the share of all lists that a candidate stands in, added to its distance."""

    def apply(self, lists, embeddings, gallery):
        """Lists of the same candidates in another order; row i of `lists` and `embeddings` is item i, -1 no item."""
        asked = lists.items if gallery is None else lists.items[gallery]
        counts = torch.bincount(asked[asked >= 0], minlength=len(lists.items))
        distances = lists.distances + self.weight * (counts / len(asked))[lists.items.clamp(min=0)]
        order = distances.argsort(dim=1, stable=True)
        return replace(lists, items=lists.items.gather(1, order), distances=distances.gather(1, order))
