"""Alpha query expansion and database augmentation on sparse top-k lists. Layer 1: pure functions on tensors.

An embedding is replaced by a weighted mean of itself and its nearest neighbours, and the search is done again
(Radenovic et al., "Fine-tuning CNN image retrieval with no human annotation", 2018). Needs no training and
O(items x dim) memory.
"""

import torch
from jaxtyping import Float32, Int64
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
) -> Float32[Tensor, "row dim"]:
    """Alpha query expansion: each embedding plus its neighbours weighted by similarity^alpha, L2-normalised.

    `neighbours` are rows of `gallery_embeddings`, best first, -1 = missing; the first `n_neighbours` are
    used. All embeddings are L2-normalised first; the similarity is the cosine, negative ones weigh 0; an
    embedding weighs 1 in its own sum, so its list should not contain it. alpha = 0 is average query
    expansion. Applied to the gallery's own lists the same function is database augmentation (Arandjelovic and
    Zisserman 2012): search again with both. Rows are independent of each other. Raises `BadInput` for
    n_neighbours outside the lists or alpha < 0.
    """
    if not 0 <= n_neighbours <= neighbours.shape[1]:
        raise BadInput(f"n_neighbours={n_neighbours} must lie in 0..{neighbours.shape[1]}, the length of the lists")
    if alpha < 0:
        raise BadInput(f"alpha={alpha} must not be negative")
    parts = [
        _expand_embedding_rows(own, gallery_embeddings, near, alpha)
        for own, near in zip(
            embeddings.split(_BLOCK_ROWS), neighbours[:, :n_neighbours].split(_BLOCK_ROWS), strict=True
        )
    ]
    return torch.cat(parts) if parts else embeddings.clone()


def _expand_embedding_rows(
    embeddings: Float32[Tensor, "row dim"],
    gallery_embeddings: Float32[Tensor, "gallery dim"],
    neighbours: Int64[Tensor, "row k"],
    alpha: float,
) -> Float32[Tensor, "row dim"]:
    total = own = torch.nn.functional.normalize(embeddings.double())
    # Rank by rank, so that a row is summed in one order whatever the block, and no [row, k, dim] is held.
    for place in neighbours.unbind(dim=1):
        near = torch.nn.functional.normalize(gallery_embeddings[place.clamp(min=0)].double())
        similarity = (own * near).sum(dim=1)
        weight = torch.where((place >= 0) & (similarity > 0), similarity.clamp(min=0) ** alpha, 0.0)
        total = total + weight[:, None] * near
    return torch.nn.functional.normalize(total).float()
