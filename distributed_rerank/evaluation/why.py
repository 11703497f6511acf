"""Why a model of tokens finds that two photos match: the places that match, and a test that takes them away."""

from collections.abc import Callable

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import UnreadableImage, read_image
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.report.why import COLOURS, Why, mutual

Explain = Callable[[ImageRef, ImageRef, float], Why | None]
N_OTHERS = 3
"""Sets of other places that are taken away, each as large as that of the matching ones."""


def explainer_of(model: PairwiseModel | None) -> Explain | None:
    """Explains a query, a candidate and their first-stage distance; None for a model without tokens."""
    if not isinstance(model, TokenSiamese):
        return None

    def explain(query: ImageRef, candidate: ImageRef, distance: float) -> Why | None:
        try:
            left, right = (model.transform(read_image(ref)) for ref in (query, candidate))
        except UnreadableImage:
            return None
        return why(model, left, right, distance, candidate.id)

    return explain


@torch.no_grad()
def why(
    model: TokenSiamese,
    query: UInt8[Tensor, "3 height width"],
    candidate: UInt8[Tensor, "3 height width"],
    distance: float,
    candidate_id: str,
) -> Why:
    """Matching places by the tokens of the last depth; those of the query become its mean colour, and so do others."""
    device = next(model.parameters()).device
    (encoded,) = model.encode(candidate[None].to(device))
    whole = model.encode(query[None].to(device))
    tokens = model.token_vectors(torch.cat([whole, encoded[None]]))[:, -1].cpu()
    places = mutual(tokens[0] @ tokens[1].T, len(COLOURS))
    grid, n_cells = model.config.grid, model.config.grid**2
    others = torch.randperm(n_cells, generator=torch.Generator().manual_seed(0))
    others = others[~torch.isin(others, places[:, 0])]
    n = len(places)
    sets = [places[:, 0], *(others.roll(n * turn)[:n] for turn in range(N_OTHERS))]
    changed = torch.stack([_without(query, cells, grid) for cells in sets]).to(device)
    logits = _logits(model, torch.cat([whole, model.encode(changed)]), encoded, distance)
    found = [float(value) for value in logits]
    has_both = 0 < n <= len(others)
    return Why(
        query, candidate, grid, places, found[0], found[1] if has_both else None,
        sum(found[2:]) / N_OTHERS if has_both else None, candidate_id,
    )  # fmt: skip


def _logits(model: TokenSiamese, queries: Tensor, candidate: Tensor, distance: float) -> Float32[Tensor, " query"]:
    distances = torch.full((len(queries),), distance, device=queries.device)
    return model(queries, candidate.expand_as(queries), distances).cpu()


def _without(pixels: UInt8[Tensor, "3 height width"], cells: Int64[Tensor, " cell"], grid: int) -> Tensor:
    """The picture with these cells of the grid in its mean colour."""
    changed, mean = pixels.clone(), pixels.float().mean(dim=(1, 2)).round().to(torch.uint8)
    height, width = pixels.shape[1] / grid, pixels.shape[2] / grid
    for row, column in (divmod(cell, grid) for cell in cells.tolist()):
        rows = slice(round(row * height), round((row + 1) * height))
        changed[:, rows, round(column * width) : round((column + 1) * width)] = mean[:, None, None]
    return changed
