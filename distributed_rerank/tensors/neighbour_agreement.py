"""How far near images have the same neighbours: a measure of how tightly embeddings hold together, without labels."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from distributed_rerank.tensors.knn import nearest

COMPARED = 10
"""Neighbours whose lists an image's own list is compared with, at most."""
BLOCK = 128


def neighbour_agreement(
    embeddings: Float[Tensor, "item dim"], items: Int64[Tensor, " query"], sizes: Int64[Tensor, "query size"]
) -> Float64[Tensor, "query size"]:
    """How much of an item's group of `size` + 1 its neighbours have in theirs: 0 nothing, 1 all.

    An item's group is the item itself and its first `size` neighbours among all of `embeddings`. It is compared with
    the groups of the first `COMPARED` of these: (shared items - 1) / size on average, for the neighbour is in both. So
    1 is a closed group, and without any groups the value is about the same for every size. Each query has sizes of its
    own, at least 1.
    """
    everyone, n_items = torch.arange(len(embeddings)), min(int(sizes.max()), len(embeddings) - 1)

    def groups_of(queries: Int64[Tensor, " query"]) -> Int64[Tensor, "query group"]:
        found = nearest(
            embeddings[queries], embeddings, query_items=queries, gallery_items=everyone, n_items=n_items
        ).items
        return torch.cat([queries[:, None], found], dim=1)

    own = groups_of(items)
    compared = own[:, 1 : COMPARED + 1].contiguous()
    needed = compared.unique()
    groups, places = groups_of(needed), torch.searchsorted(needed, compared)
    columns, total = torch.arange(own.shape[1]), torch.zeros(sizes.shape, dtype=torch.float64)
    sizes = sizes.clamp(max=n_items)
    for rows in torch.arange(len(items)).split(BLOCK):
        for neighbour in range(compared.shape[1]):
            # [query, 1 + k, 1 + k]: whether both groups hold the same item at these places.
            is_same = own[rows][:, :, None] == groups[places[rows, neighbour]][:, None, :]
            for number, size in enumerate(sizes[rows].T):
                is_in = columns <= size[:, None]
                shared = (is_same & is_in[:, :, None] & is_in[:, None, :]).sum(dim=(1, 2))
                total[rows, number] += (shared - 1).double() / size * (neighbour < size)
    return total / sizes.clamp(max=compared.shape[1])
