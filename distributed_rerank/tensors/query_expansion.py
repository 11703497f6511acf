"""Alpha query expansion and database augmentation on sparse top-k lists. Layer 1: pure functions on tensors.

An embedding is replaced by a weighted mean of itself and its nearest neighbours, and the search is done again
(Radenovic et al., "Fine-tuning CNN image retrieval with no human annotation", 2018). Needs no training and
O(items x dim) memory.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

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
    embeddings are L2-normalised first; the similarity is the cosine, negative ones weigh 0; an embedding weighs 1 in
    its own sum, so its list should not contain it. alpha = 0 is average query expansion. Where `weights` are given
    (not negative, 0 = leave out), a neighbour weighs weight^alpha instead. Applied to the gallery's own lists the
    same function is database augmentation (Arandjelovic and Zisserman 2012): search again with both. Rows are
    independent of each other. Raises `BadInput` for n_neighbours outside the lists or alpha < 0.
    """
    if not 0 <= n_neighbours <= neighbours.shape[1]:
        raise BadInput(f"n_neighbours={n_neighbours} must lie in 0..{neighbours.shape[1]}, the length of the lists")
    if alpha < 0:
        raise BadInput(f"alpha={alpha} must not be negative")
    blocks = torch.arange(len(embeddings)).split(_BLOCK_ROWS)
    parts = [
        _expand_embedding_rows(
            embeddings[rows],
            gallery_embeddings,
            neighbours[rows, :n_neighbours],
            alpha,
            None if weights is None else weights[rows, :n_neighbours],
        )
        for rows in blocks
    ]
    return torch.cat(parts) if parts else embeddings.clone()


def expanded_distances(
    embeddings: Float32[Tensor, "item dim"],
    items: Int64[Tensor, "item k"],
    weights: Float[Tensor, "item k"],
    queries: Int64[Tensor, " query"],
    *,
    k: int,
    alpha: float,
) -> Float32[Tensor, "query list"]:
    """Distances 1 - cosine of each query and the candidates of its list when all embeddings are expanded; inf
    where -1.

    `items` are the lists of all items, queries and gallery alike (-1 = fewer exist), and `weights` those of their
    places: each embedding is expanded by the first `k` of its own list (or as many as there are). In blocks, so that
    memory is O(items x (k + dim)).
    """
    n_neighbours = min(k, items.shape[1])
    expanded = expand_embeddings(embeddings, embeddings, items, n_neighbours=n_neighbours, alpha=alpha, weights=weights)
    parts = [
        torch.stack([(expanded[rows] * expanded[near.clamp(min=0)]).sum(dim=1) for near in items[rows].T], dim=1)
        for rows in queries.split(_BLOCK_ROWS)
    ]
    cosines = torch.cat(parts) if parts else torch.empty(0, items.shape[1])
    return torch.where(items[queries] >= 0, (1 - cosines).clamp(min=0), torch.inf)


def _expand_embedding_rows(
    embeddings: Float32[Tensor, "row dim"],
    gallery_embeddings: Float32[Tensor, "gallery dim"],
    neighbours: Int64[Tensor, "row k"],
    alpha: float,
    weights: Float[Tensor, "row k"] | None,
) -> Float32[Tensor, "row dim"]:
    total = own = torch.nn.functional.normalize(embeddings.double())
    # Rank by rank, so that a row is summed in one order whatever the block, and no [row, k, dim] is held.
    for column, place in enumerate(neighbours.unbind(dim=1)):
        near = torch.nn.functional.normalize(gallery_embeddings[place.clamp(min=0)].double())
        similarity = (own * near).sum(dim=1) if weights is None else weights[:, column].double()
        weight = torch.where((place >= 0) & (similarity > 0), similarity.clamp(min=0) ** alpha, 0.0)
        total = total + weight[:, None] * near
    return torch.nn.functional.normalize(total).float()
