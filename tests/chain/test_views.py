"""Several photos of one thing: their combination is chosen on labels, and its gain holds on other labels."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from distributed_rerank.chain.chain import Chain, PairwiseStep, read_chain, write_chain
from distributed_rerank.chain.choice import choose_views
from distributed_rerank.chain.evidence import Evidence, Things
from distributed_rerank.chain.trials import fit_curve, try_chain
from distributed_rerank.chain.views import things_of
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.metrics import count_relevant
from distributed_rerank.tensors.things import count_relevant_things

N_THINGS, N_PHOTOS = 40, 6


def evidence(seed: int, own_noise: float) -> Evidence:
    """Things of six photos; logits say whether two match, with noise of the two things and of the pair."""
    generator = torch.Generator().manual_seed(seed)
    things = torch.arange(N_THINGS).repeat_interleave(N_PHOTOS)
    items = torch.arange(len(things))
    others = (items[:, None] + 1 + torch.arange(len(items) - 1)) % len(items)
    differ = (things[others] != things[:, None]).float()
    of_things = torch.randn(N_THINGS, N_THINGS, generator=generator)[things[:, None], things[others]]
    logits = 3 * differ + 0.5 * of_things + own_noise * torch.randn(others.shape, generator=generator)
    distances = torch.linspace(0.1, 1, len(items) - 1).expand(len(items), -1)
    n_relevant = count_relevant(items, things, None, items, things, None)
    by_thing = count_relevant_things(items, items, things, torch.full_like(items, -1), things)
    lists = CandidateLists(items, others, distances)
    return Evidence(lists, things, n_relevant, logits, things=Things(things, by_thing))


def pairwise_chain(known: Evidence) -> Chain:
    """The order of the logits, with their probabilities."""
    assert known.logits is not None
    chain = Chain((PairwiseStep(known.logits.shape[1], "replace"),))
    curve = fit_curve(known, try_chain(known, chain))
    assert curve is not None
    return replace(chain, calibration=asdict(curve))


def test_combined_photos_beat_the_best_photo_on_labels_not_seen() -> None:
    known = evidence(0, own_noise=1.5)
    chain = choose_views(known, pairwise_chain(known), 0, 0.995)
    assert chain.views in ("noisy_or", "mean")
    assert chain.chosen_on["views"]["taken"]
    other = evidence(1, own_noise=1.5)
    lists = try_chain(other, chain).lists
    assert other.things is not None
    by_thing = replace(other, n_relevant=other.things.n_relevant)
    values = [
        by_thing.measure(by_thing.queries, things_of(each, lists, other.things.numbers).views[by_thing.queries])
        for each in (replace(chain, views="best"), chain)
    ]
    gain = statistics.compare(values[0], values[1], by_thing.query_labels(), seed=0)
    assert gain["cmc@1"].low > 0
    assert gain["map@10"].low > 0


def test_best_photo_stays_where_every_photo_says_the_same() -> None:
    known = evidence(0, own_noise=0.0)
    chain = choose_views(known, pairwise_chain(known), 0, 0.995)
    assert chain.views == "best"
    assert not chain.chosen_on["views"]["taken"]


def test_without_things_or_probabilities_nothing_is_chosen() -> None:
    known = evidence(0, own_noise=1.5)
    chain = pairwise_chain(known)
    assert choose_views(replace(known, things=None), chain, 0, 0.995) == chain
    assert choose_views(known, Chain(), 0, 0.995) == Chain()


def test_chain_file_keeps_the_combination_and_refuses_an_unknown_one(tmp_path: Path) -> None:
    chain = Chain(views="noisy_or")
    write_chain(chain, tmp_path)
    assert read_chain(tmp_path) == chain
    assert chain.identity() != Chain().identity()
    path = tmp_path / "chain.json"
    path.write_text(path.read_text().replace("noisy_or", "loudest"))
    with pytest.raises(BadInput, match="views='loudest' is unknown"):
        read_chain(tmp_path)
