"""The chain as a file that comes back equal or is refused by name, and applied to lists."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from chain_evidence import evidence

from distributed_rerank.chain.apply import apply
from distributed_rerank.chain.chain import (
    AdaptStep,
    AlphaQEStep,
    Chain,
    KReciprocalStep,
    NeighbourhoodStep,
    PairwiseStep,
    QueryExpansionStep,
    read_chain,
    write_chain,
)
from distributed_rerank.errors import BadInput
from distributed_rerank.models.adapter import Adapter
from distributed_rerank.tensors.candidate_lists import CandidateLists


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


def test_chain_that_adapts_comes_back_with_its_adapter_or_is_refused(tmp_path: Path) -> None:
    adapter = Adapter(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    chain = Chain((AdaptStep("discriminate", 4.0), PairwiseStep(10)), adapter=adapter)
    write_chain(chain, tmp_path)
    read = read_chain(tmp_path)
    assert read == chain
    assert read.identity() == chain.identity()
    assert read.adapter is not None
    other = Adapter(torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    assert Chain(chain.steps, adapter=other).identity() != chain.identity()
    assert chain.neighbourhood == ()
    with pytest.raises(BadInput, match="adapt comes first"):
        Chain((PairwiseStep(10), AdaptStep()))
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(BadInput, match=r"adapter\.safetensors"):
        read_chain(tmp_path)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"step": "magic"}, "magic"),
        ({"step": "adapt", "kind": "bend"}, "bend"),
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


def test_description_tells_steps_and_constants_to_four_digits() -> None:
    chain = Chain(
        (PairwiseStep(50, "fuse", 0.0, 32.639584), NeighbourhoodStep(11.0734, -0.27268, "direct", 20, 3, 0.3))
    )
    assert chain.describe() == (
        "first stage -> pairwise(top_n=50, rule=fuse, weight=0, temperature=32.64, pinned=0)"
        " -> neighbourhood(slope=11.07, intercept=-0.2727, kind=direct, k1=20, k2=3, weight=0.3, pinned=0)"
    )


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


@pytest.mark.parametrize("step", [NeighbourhoodStep(2.0, 3.0, "reciprocal", 20, 6), QueryExpansionStep(2.0, 3.0, 20)])
@pytest.mark.parametrize("width", [0, 4])
def test_probability_step_on_lists_shorter_than_its_constants_uses_them_whole(
    step: NeighbourhoodStep | QueryExpansionStep, width: int
) -> None:
    known = evidence(1.5, None)
    lists = known.lists.first(width)
    result = apply(Chain((step,)), lists, embeddings=known.embeddings)
    assert torch.equal(result.items.sort(dim=1).values, lists.items.sort(dim=1).values)
    assert torch.equal(result.distances, result.distances.sort(dim=1).values)


def test_alpha_qe_searches_anew_but_never_finds_the_own_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(12, 4, generator=generator), dim=1)
    embeddings[1::2] = embeddings[::2] + 0.01  # the two of a sequence are the nearest of all
    sequences = torch.arange(12) // 2
    items = torch.tensor([[j for j in range(12) if j // 2 != i // 2][:6] for i in range(12)])
    lists = CandidateLists(torch.arange(12), items, torch.arange(6.0).expand(12, 6).clone())
    found = apply(Chain((AlphaQEStep(2, 1.0),)), lists, embeddings=embeddings, sequences=sequences).items
    assert not (sequences[found] == sequences[:, None]).any()
    free = apply(Chain((AlphaQEStep(2, 1.0),)), lists, embeddings=embeddings).items
    assert (sequences[free] == sequences[:, None]).any(), "the case shows nothing"


@dataclass(frozen=True)
class Reversed:
    """A step of the test's: the list the other way round."""

    keeps: str = "order"

    def apply(self, lists, embeddings, gallery):
        items = torch.zeros_like(lists.items) if self.keeps == "nothing" else lists.items.flip(1)
        distances = lists.distances if self.keeps == "order" else -lists.distances
        return replace(lists, items=items, distances=distances)


def test_own_step_may_change_the_order_alone() -> None:
    lists = CandidateLists(torch.arange(2), torch.tensor([[1, 2], [0, 2]]), torch.tensor([[0.1, 0.2], [0.3, 0.5]]))
    assert apply(Chain((Reversed(),)), lists).items.tolist() == [[2, 1], [2, 0]]
    with pytest.raises(BadInput, match="Reversed must return the candidates of each list in another order"):
        apply(Chain((Reversed("nothing"),)), lists)
    with pytest.raises(BadInput, match="Reversed must return distances that ascend"):
        apply(Chain((Reversed("distances"),)), lists)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "chain.json names os:system, which is no module of your own"),
        ("distributed_rerank.errors:BadInput", "which is no module of your own"),
        ("no_such:Step", "the module no_such cannot be imported"),
        ("own_by_hand:function", "must be a dataclass with a method apply"),
        ("reversed", "or your own as package.module:Class"),
    ],
)
def test_step_that_is_none_of_ones_own_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_by_hand.py").write_text("def function(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "chain.json").write_text(json.dumps({"schema_version": 2, "steps": [{"step": name}]}))
    with pytest.raises(BadInput, match=message):
        read_chain(tmp_path / "chain.json")
