"""The chain: a file that comes back equal or is refused by name, a choice that stays away from noise."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.procedures.chain.apply import apply
from distributed_rerank.procedures.chain.chain import (
    AlphaQEStep,
    Chain,
    KReciprocalStep,
    NeighbourhoodStep,
    PairwiseStep,
    QueryExpansionStep,
    read_chain,
    write_chain,
)
from distributed_rerank.procedures.chain.choice import choose, fusion_figure
from distributed_rerank.procedures.chain.evidence import Evidence, try_chain
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.metrics import count_relevant

N_LABELS, N_IMAGES = 30, 5


def evidence(spread: float, logit_noise: float | None, is_shuffled: bool = False, seed: int = 0) -> Evidence:
    """Points around label centres; logits tell the truth but for noise, or are noise alone (None)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N_LABELS).repeat_interleave(N_IMAGES)
    centres = torch.randn(N_LABELS, 16, generator=generator)
    embeddings = centres[labels] + spread * torch.randn(len(labels), 16, generator=generator)
    items = torch.arange(len(labels))
    lists = nearest(embeddings, embeddings, query_items=items, gallery_items=items, n_items=30)
    if is_shuffled:
        labels = labels[torch.randperm(len(labels), generator=generator)]
    truth = (labels[lists.items] != labels[:, None]).float()
    noise = torch.randn(truth.shape, generator=generator)
    logits = noise if logit_noise is None else 4 * truth + logit_noise * noise
    n_relevant = count_relevant(items, labels, None, items, labels, None)
    return Evidence(lists, labels, n_relevant, logits, embeddings)


def test_chain_file_comes_back_equal(tmp_path: Path) -> None:
    chain = Chain(
        (
            PairwiseStep(50, "fuse", 2.0, 0.5),
            KReciprocalStep(10, 3, 0.5),
            NeighbourhoodStep(3.5, -1.0, "reciprocal", 12, 2, 0.7),
            QueryExpansionStep(3.5, -1.0, 7, 2.0, 0.3),
            AlphaQEStep(4, 2.0),
        ),
        {"n_labels": 7},
        {"slope": 1.5},
    )
    write_chain(chain, tmp_path)
    assert read_chain(tmp_path) == chain
    assert read_chain(tmp_path / "chain.json") == chain


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"step": "magic"}, "magic"),
        ({"step": "pairwise"}, "top_n"),
        ({"step": "pairwise", "top_n": 1}, "top_n=1"),
        ({"step": "pairwise", "top_n": 10, "temperature": 0}, "temperature=0"),
        ({"step": "pairwise", "top_n": 10, "rule": "vote"}, "vote"),
        ({"step": "pairwise", "top_n": "10"}, "top_n='10'"),
        ({"step": "k_reciprocal", "k1": 3, "k2": 4}, "k2=4"),
        ({"step": "k_reciprocal", "k3": 4}, "k3"),
        ({"step": "neighbourhood", "k1": 4}, "slope, intercept"),
        ({"step": "neighbourhood", "slope": -1.0, "intercept": 0.0}, "slope=-1.0"),
        ({"step": "neighbourhood", "slope": 1.0, "intercept": 0.0, "kind": "both"}, "both"),
        ({"step": "query_expansion", "slope": 1.0, "intercept": 0.0, "weight": 2}, "weight=2"),
    ],
)
def test_chain_file_with_a_wrong_entry_is_refused_by_name(tmp_path: Path, entry: dict, named: str) -> None:
    (tmp_path / "chain.json").write_text(json.dumps({"schema_version": 2, "steps": [entry]}))
    with pytest.raises(BadInput, match=named):
        read_chain(tmp_path)


@pytest.mark.parametrize("content", [{"steps": []}, {"schema_version": 3, "steps": []}])
def test_chain_file_of_another_version_is_refused_with_what_to_do(tmp_path: Path, content: dict) -> None:
    (tmp_path / "chain.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"schema_version [13], this code reads 2; train the model again"):
        read_chain(tmp_path)


def test_chain_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        read_chain(tmp_path / "chain.json")


def test_empty_chain_leaves_the_lists() -> None:
    lists = evidence(1.0, None).lists
    assert apply(Chain(), lists) is lists


def test_replace_orders_the_head_by_logits_and_keeps_the_tail() -> None:
    known = evidence(1.5, 0.1)
    logits = known.logits[:, :10] if known.logits is not None else torch.empty(0, 0)
    result = apply(Chain((PairwiseStep(10, "replace"),)), known.lists, logits)
    expected = known.lists.items[:, :10].gather(1, logits.argsort(dim=1, stable=True))
    assert torch.equal(result.items[:, :10], expected)
    assert torch.equal(result.items[:, 10:], known.lists.items[:, 10:])


def test_choice_on_shuffled_labels_does_no_harm_to_others() -> None:
    chains = [choose(evidence(1.0, None, is_shuffled=True, seed=seed), seed) for seed in range(4)]
    assert all(chain.pairwise is None for chain in chains)
    assert sum(chain.steps == () for chain in chains) >= 3
    for seed, chain in enumerate(chains):
        fresh = evidence(1.0, None, is_shuffled=True, seed=100 + seed)
        change = try_chain(fresh, chain).figures()["map@10"] - try_chain(fresh, Chain()).figures()["map@10"]
        assert change >= -0.003


def test_choice_with_a_perfect_first_stage_is_the_first_stage() -> None:
    assert choose(evidence(0.01, 1.0)).steps == ()


def test_choice_takes_a_pairwise_model_that_helps() -> None:
    known = evidence(1.5, 2.0)
    chain = choose(known)
    assert chain.pairwise is not None
    assert chain.chosen_on["chosen"]["map@10"] > chain.chosen_on["first_stage"]["map@10"] + 0.05
    assert chain.chosen_on["n_labels"] == N_LABELS
    json.dumps(chain.chosen_on, allow_nan=False)


def test_choice_leaves_a_pairwise_model_of_noise_out() -> None:
    chain = choose(evidence(1.0, None))
    assert chain.pairwise is None


def test_choice_is_the_same_for_logits_of_another_scale() -> None:
    known = evidence(1.5, 2.0)
    assert known.logits is not None
    scaled = Evidence(known.lists, known.labels, known.n_relevant, known.logits * 100, known.embeddings)
    first, second = choose(known), choose(scaled)
    assert first.pairwise is not None
    assert second.pairwise is not None
    assert first.pairwise.weight == second.pairwise.weight
    assert second.pairwise.temperature == pytest.approx(100 * first.pairwise.temperature, rel=1e-4)


def test_fusion_figure_of_true_logits_is_that_of_a_perfect_head() -> None:
    known = evidence(1.5, 0.0)
    found = first_hits(known)
    assert fusion_figure(known)["cmc@1"] == pytest.approx(float(found.double().mean()))


def first_hits(known: Evidence) -> Tensor:
    """Whether any relevant candidate was retrieved at all: what a perfect head puts first."""
    return (known.labels[known.lists.items] == known.labels[:, None]).any(dim=1)
