"""The pairs that are kept hold every true neighbour, no excluded pair, and little else."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distributed_rerank.tensors import candidate_pairs as pairs
from distributed_rerank.tensors.distances import rounded_queries
from distributed_rerank.tensors.hardware import bf16_support

N_ITEMS = 6
FORMATS = [
    "float32",
    pytest.param(
        "bf16", marks=pytest.mark.skipif(bf16_support(torch.device("cpu")) is None, reason="no bf16 on this CPU")
    ),
]


def embeddings_of(kind: str, generator: torch.Generator) -> Tensor:
    if kind == "ties":
        return torch.randint(0, 3, (260, 4), generator=generator).float()
    if kind == "close":
        return 100 + 1e-3 * torch.randn(260, 24, generator=generator)
    return torch.randn(260, 33, generator=generator)


def kept_pairs(
    embeddings: Tensor, sequences: Tensor, number_format: str, reach: Tensor, monkeypatch: pytest.MonkeyPatch
) -> set[tuple[int, int]]:
    """(query, gallery item) of the first 40 items in all of them."""
    items = torch.arange(len(embeddings))
    queries = pairs.checked_side(embeddings[:40], items[:40], sequences[:40])
    gallery = pairs.sorted_by_item(pairs.checked_side(embeddings.flip(0), items.flip(0), sequences.flip(0)))
    if number_format == "bf16":
        monkeypatch.setattr(pairs, "MOST_KEPT", 10**9)
        monkeypatch.delattr(pairs, "_pairs_by_float32")  # bf16 alone must do
        queries = replace(queries, rounded=rounded_queries(queries.embeddings))
        gallery = replace(gallery, rounded=pairs.rounded_slice(gallery, N_ITEMS))
    workspace = torch.empty(40 * (len(items) + pairs.LARGEST_GROUP))
    rows, columns = pairs.candidate_pairs(queries, gallery, reach, N_ITEMS, workspace)
    codes = rows * len(items) + columns
    assert bool((codes.diff() > 0).all()), "ascending and each once"
    return set(zip(rows.tolist(), gallery.items[columns].tolist(), strict=True))


def true_distances(embeddings: Tensor, sequences: Tensor) -> Tensor:
    """[query, item] in float64; inf for the query itself and its sequence."""
    distances = torch.cdist(embeddings[:40].double(), embeddings.double(), compute_mode="donot_use_mm_for_euclid_dist")
    is_same = (sequences[:40, None] == sequences) & (sequences >= 0)
    return distances.masked_fill(is_same, torch.inf).fill_diagonal_(torch.inf)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("kind", ["random", "ties", "close"])
def test_candidate_pairs_hold_all_that_are_no_further_than_the_nth(
    kind: str, number_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings, sequences = embeddings_of(kind, generator), torch.randint(-1, 60, (260,), generator=generator)
    distances = true_distances(embeddings, sequences)
    nearest = distances <= distances.kthvalue(N_ITEMS, dim=1, keepdim=True).values
    wanted = {(int(q), int(g)) for q, g in nearest.nonzero()}
    kept = kept_pairs(embeddings, sequences, number_format, torch.full((40,), torch.inf), monkeypatch)
    assert wanted <= kept
    assert all(distances[q, g] < torch.inf for q, g in kept), "no item itself, no item of its sequence"
    if kind == "random":
        assert len(kept) <= 2 * len(wanted)


@pytest.mark.parametrize("number_format", FORMATS)
def test_candidate_pairs_reach_of_earlier_slices_leaves_out_what_is_further(
    number_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    embeddings, sequences = embeddings_of("random", generator), torch.full((260,), -1)
    distances = true_distances(embeddings, sequences)
    second = distances.kthvalue(2, dim=1).values.float()
    kept = kept_pairs(embeddings, sequences, number_format, second, monkeypatch)
    assert {(int(q), int(g)) for q, g in (distances.float() <= second[:, None]).nonzero()} <= kept
    slack = 1.0001 if number_format == "float32" else 1.1
    assert all(distances[q, g] <= slack * second[q] for q, g in kept)
