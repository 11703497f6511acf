"""Alpha query expansion and database augmentation on sparse top-k lists.

An embedding is replaced by a weighted mean of itself and its nearest neighbours, and the search is done again
(Radenovic et al., "Fine-tuning CNN image retrieval with no human annotation", 2018). Needs no training and O(items x
dim) memory.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from distributed_rerank.errors import BadInput

_BLOCK_ROWS = 512


def expand_embeddings(
    embeddings: Float32[Tensor, "row dim"],
    gallery_embeddings: Float32[Tensor, "gallery dim"],
    neighbours: Int64[Tensor, "row k"],
    *,
    n_neighbours: int,
    alpha: float,
    weights: Float[Tensor, "row k"] | None = None,
) -> Float32[Tensor, "row dim"]:
    """Alpha query expansion: each embedding plus its neighbours weighted by similarity^alpha, L2-normalised.

    `neighbours` are rows of `gallery_embeddings`, best first, -1 = missing; the first `n_neighbours` are used. All
    embeddings are L2-normalised first. The similarity is the cosine; neighbours of negative similarity weigh 0. The
    embedding itself weighs 1, so its list should not contain it. alpha = 0 is average query expansion. With `weights`
    (not negative, 0 = leave out) a neighbour weighs weight^alpha instead. Applied to the gallery's own lists the same
    function is database augmentation (Arandjelovic and Zisserman 2012): search again with both. Rows are independent of
    each other. Raises `BadInput` for n_neighbours outside the lists or alpha < 0.
    """
    if not 0 <= n_neighbours <= neighbours.shape[1]:
        raise BadInput(f"n_neighbours={n_neighbours} must lie in 0..{neighbours.shape[1]}, the length of the lists")
    if alpha < 0:
        raise BadInput(f"alpha={alpha} must not be negative")
    parts = []
    for rows in torch.arange(len(embeddings)).split(_BLOCK_ROWS):
        total = own = normalize(embeddings[rows].double())
        # Place by place of the lists, so that rows are summed in one order for any block, and no [row, k, dim] is held.
        for column in range(n_neighbours):
            # [row, dim]: the neighbours at this place; [row]: their weights, 0 where one is missing.
            place = neighbours[rows, column]
            near = normalize(gallery_embeddings[place.clamp(min=0)].double())
            similarity = (own * near).sum(dim=1) if weights is None else weights[rows, column].double()
            weight = torch.where((place >= 0) & (similarity > 0), similarity.clamp(min=0) ** alpha, 0.0)
            total = total + weight[:, None] * near
        parts.append(normalize(total).float())
    return torch.cat(parts)


def expanded_distances(
    embeddings: Float32[Tensor, "item dim"],
    items: Int64[Tensor, "item k"],
    weights: Float[Tensor, "item k"],
    queries: Int64[Tensor, " query"],
    *,
    k: int,
    alpha: float,
) -> Float32[Tensor, "query list"]:
    """Distances 1 - cosine of each query and its list's candidates after expanding all embeddings; inf where -1.

    `items` are the lists of all items, queries and gallery alike (-1 = fewer exist), with a weight for each place. Each
    embedding is expanded by the first `k` of its own list (or as many as there are). In blocks, so that memory is
    O(items x (k + dim)).
    """
    n_neighbours = min(k, items.shape[1])
    expanded = expand_embeddings(embeddings, embeddings, items, n_neighbours=n_neighbours, alpha=alpha, weights=weights)
    # [row, list] for each block of rows, column by column: the cosines with the candidates at one place of the list.
    parts = [
        torch.stack([(expanded[rows] * expanded[near.clamp(min=0)]).sum(dim=1) for near in items[rows].T], dim=1)
        for rows in queries.split(_BLOCK_ROWS)
    ]
    return torch.where(items[queries] >= 0, (1 - torch.cat(parts)).clamp(min=0), torch.inf)
