import hashlib
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.images import read_image
from distributed_rerank.errors import BadInput
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.scoring import plan as scoring_plan
from distributed_rerank.scoring import score as scoring
from distributed_rerank.scoring.rounds import ScoredBlock, Scoring
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.storage.artifacts import read_manifest
from distributed_rerank.tensors.candidate_lists import empty_lists
from tests.small_catalogue import concat_model, distance_model, make_catalogue, make_lists, save_picture

WORK = WorkConfig(queries_per_block=4, pairs_per_batch=6, encode_batch=3)
NAME = "pair_distances.parquet"


@pytest.mark.parametrize("model", [concat_model(), distance_model()], ids=["concat", "distance"])
def test_score_every_pair_equals_the_model_on_it_alone(tmp_path: Path, model: PairwiseModel) -> None:
    catalogue = make_catalogue(tmp_path / "images", 9)
    lists = make_lists(catalogue, 6)
    logits = score_candidates(catalogue, lists, model, 5, tmp_path / "out", work=WORK).logits
    assert logits is not None
    pixels = torch.stack([model.transform(read_image(ref)) for ref in catalogue.images()])
    with torch.no_grad():
        encoded = [model.encode(one[None]) for one in pixels]
        for query in range(9):
            for column, item in enumerate(lists.items[query, :5].tolist()):
                if item < 0:
                    assert logits[query, column].isnan()
                    continue
                logit = model(encoded[query], encoded[item], lists.distances[query, column : column + 1])
                assert float(logits[query, column]) == pytest.approx(float(logit), rel=1e-4, abs=1e-5)


def test_score_in_rounds_gives_the_same_bytes_and_counts_what_is_repeated(tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 17), concat_model()
    lists = make_lists(catalogue, 5)
    score_candidates(catalogue, lists, model, 5, tmp_path / "one", work=WORK)
    small = replace(WORK, encoding_gb=12 * model.bytes_per_image / 10**9)
    score_candidates(catalogue, lists, model, 5, tmp_path / "many", work=small)
    assert (tmp_path / "one" / NAME).read_bytes() == (tmp_path / "many" / NAME).read_bytes()
    one, many = (read_manifest(tmp_path / name)["counts"] for name in ("one", "many"))
    n_pairs = int((lists.items >= 0).sum())
    assert one == {
        "images_decoded": 17, "encodings_computed": 17, "encodings_repeated": 0, "pairs_scored": n_pairs
    }  # fmt: skip
    assert many["encodings_computed"] - many["encodings_repeated"] == 17
    assert many["encodings_repeated"] > 0


@pytest.mark.parametrize("n_blocks", [2, 3, 99])
def test_score_several_blocks_in_a_call_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_blocks: int
) -> None:
    """As on a GPU; blocks share images, and the candidates of one cannot be read."""
    catalogue, model = make_catalogue(tmp_path / "images", 17, broken=(3,)), concat_model()
    lists = make_lists(catalogue, 5)
    score_candidates(catalogue, lists, model, 5, tmp_path / "one", work=replace(WORK, max_rejects=0.1))
    calls: list[int] = []

    class Counted(scoring.Scorer):
        def score(self, tasks: Any, *arrays: np.ndarray) -> scoring.Scores:
            calls.append(len(tasks))
            return super().score(tasks, *arrays)

    monkeypatch.setattr(scoring, "Scorer", Counted)
    as_on_gpu = replace(WORK, blocks_per_call=n_blocks, threads_per_worker=2)
    score_candidates(catalogue, lists, model, 5, tmp_path / "several", work=replace(as_on_gpu, max_rejects=0.1))
    for name in (NAME, "rejects.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()
    assert calls == {2: [2, 2, 1], 3: [3, 2], 99: [5]}[n_blocks]


def test_score_encodings_of_a_round_are_gone_before_the_next_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 17), concat_model()
    arrays: list[weakref.ref] = []
    alive: list[int] = []
    n_scored = 0

    class Watched(scoring.Scorer):
        def encode(self, task: Any) -> Any:
            nonlocal n_scored
            if n_scored:  # a new round begins
                alive.append(sum(array() is not None for array in arrays))
                n_scored = 0
            array, encoded = super().encode(task)
            arrays.append(weakref.ref(array))
            return array, encoded

        def score(self, *arguments: Any) -> scoring.Scores:
            nonlocal n_scored
            n_scored += 1
            return super().score(*arguments)

    monkeypatch.setattr(scoring, "Scorer", Watched)
    small = replace(WORK, encoding_gb=12 * model.bytes_per_image / 10**9)
    score_candidates(catalogue, make_lists(catalogue, 5), model, 5, tmp_path / "out", work=small)
    assert len(alive) > 1
    assert not any(alive)


def test_score_killed_continues_to_the_same_bytes(tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 17, broken=(3,)), concat_model()
    lists = make_lists(catalogue, 5)
    whole = score_candidates(catalogue, lists, model, 5, tmp_path / "whole", work=replace(WORK, max_rejects=0.1))

    def dies(run: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        yield from list(scoring.score_blocks(run))[3:]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_candidates(
            catalogue, lists, model, 5, tmp_path / "killed", work=WORK, executors=SimpleNamespace(score_blocks=dies)
        )
    killed = score_candidates(catalogue, lists, model, 5, tmp_path / "killed", work=replace(WORK, max_rejects=0.1))
    for name in (NAME, "rejects.parquet"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_manifest(tmp_path / "killed")["blocks"]["reused"] == 2 * 2
    np.testing.assert_array_equal(killed.logits, whole.logits)  # NaN in the same places


def test_score_broken_image_removes_its_pairs_and_no_other(tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 9, broken=(2,)), concat_model()
    lists = make_lists(catalogue, 5)
    found = score_candidates(catalogue, lists, model, 5, tmp_path / "out", work=replace(WORK, max_rejects=0.2))
    removed = (lists.items < 0) | (lists.items == 2)
    removed[2] = True
    assert found.logits is not None
    assert torch.equal(found.logits.isnan(), removed)
    (row,) = tables.read_table(tmp_path / "out" / "rejects.parquet", "rejects").to_pylist()
    assert (row["id"], row["stage"]) == ("picture_002.png", "score")


def test_score_too_many_rejects_fails_and_goes_on_once_they_are_repaired(tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 9, broken=(2, 6)), concat_model()
    lists = make_lists(catalogue, 5)
    with pytest.raises(BadInput, match=r"2 of 9 images .*rejects\.parquet"):
        score_candidates(catalogue, lists, model, 5, tmp_path / "out", work=replace(WORK, max_rejects=0.1))
    for number in (2, 6):
        save_picture(tmp_path / "images" / f"picture_{number:03d}.png", number)
    found = score_candidates(catalogue, lists, model, 5, tmp_path / "out", work=WORK)
    assert found.logits is not None
    assert torch.equal(found.logits.isfinite(), lists.items >= 0)
    assert found.rejects == ()


def test_score_lost_block_or_pair_is_an_error(tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 9), concat_model()
    lists = make_lists(catalogue, 5)

    def loses_block(run: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        yield from list(scoring.score_blocks(run))[1:]

    def loses_pair(run: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        for number, block in scoring.score_blocks(run):
            block.logits[0, 0] = np.nan
            yield number, block

    with pytest.raises(AssertionError, match="never came back"):
        score_candidates(
            catalogue,
            lists,
            model,
            5,
            tmp_path / "block",
            work=WORK,
            executors=SimpleNamespace(score_blocks=loses_block),
        )
    with pytest.raises(AssertionError, match="a pair was lost"):
        score_candidates(
            catalogue, lists, model, 5, tmp_path / "pair", work=WORK, executors=SimpleNamespace(score_blocks=loses_pair)
        )


def test_score_logit_that_is_not_finite_is_told_with_its_pair_and_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 5), concat_model()
    lists = make_lists(catalogue, 3)
    wanted = lists.distances[2, 1]
    forward = ConcatSiamese.forward

    def broken(self: ConcatSiamese, query: Tensor, gallery: Tensor, distance: Tensor) -> Tensor:
        logits = forward(self, query, gallery, distance)
        return torch.where(distance == wanted, torch.nan, logits)

    monkeypatch.setattr(ConcatSiamese, "forward", broken)
    pair = " and ".join(repr(catalogue.ids[item]) for item in (2, int(lists.items[2, 1])))
    with pytest.raises(BadInput, match=rf"no finite logit of {re.escape(pair)} \(1 pairs of their block\)"):
        score_candidates(catalogue, lists, model, 5, tmp_path / "out", work=WORK)
    for path in tmp_path.rglob("*.parquet"):
        table = pd.read_parquet(path)
        assert "logit" not in table or table["logit"].notna().all()


def test_score_model_of_the_caller_is_left_as_it_was(tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 5), concat_model().train()
    score_candidates(catalogue, make_lists(catalogue, 3), model, 5, tmp_path / "out", work=WORK)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_score_fingerprint_is_that_of_int64_items_however_they_are_held(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 9)
    lists = make_lists(catalogue, 6).long()
    short = replace(lists, items=lists.items.int())
    parts = (lists.query_items, lists.items[:, :5], lists.distances[:, :5])
    expected = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    for name, given in (("long", lists), ("short", short)):
        score_candidates(catalogue, given, concat_model(), 5, tmp_path / name, work=WORK)
        assert read_manifest(tmp_path / name)["fingerprint"]["candidates"] == expected
    assert (tmp_path / "long" / NAME).read_bytes() == (tmp_path / "short" / NAME).read_bytes()


def test_score_other_candidates_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 5), concat_model()
    score_candidates(catalogue, make_lists(catalogue, 3), model, 5, tmp_path / "out", work=WORK)
    with pytest.raises(BadInput, match="candidates"):
        score_candidates(catalogue, make_lists(catalogue, 3, seed=1), model, 5, tmp_path / "out", work=WORK)


@pytest.mark.parametrize(("tapers", "sizes"), [(False, [4] * 5 + [3]), (True, [4] + [1] * 19)])
def test_plan_covers_every_pair_once_and_orders_images_by_first_use(
    tapers: bool, sizes: list[int], tmp_path: Path
) -> None:
    lists = make_lists(make_catalogue(tmp_path, 23), 6)
    plan = scoring_plan.make_plan(lists, top_n=5, queries_per_block=4, images_per_batch=3, tapers=tapers)
    assert [len(block.lists) for block in plan.blocks] == sizes
    assert sorted(query for block in plan.blocks for query in block.lists.query_items.tolist()) == list(range(23))
    place_of = {item: place for place, item in enumerate(plan.items.tolist())}
    seen: set[int] = set()
    for block in plan.blocks:
        expected = lists.of_queries(block.lists.query_items).first(5)
        assert torch.equal(block.lists.items, expected.items)
        assert torch.equal(block.lists.distances, expected.distances)
        own = set(block.images().tolist())
        new = [place_of[item] for item in own - seen]
        assert sorted(new) == list(range(len(seen), len(seen) + len(new)))
        assert set(block.batches.tolist()) == {place_of[item] // 3 for item in own}
        assert own <= {item for number in block.batches.tolist() for item in plan.batch(number).tolist()}
        seen |= own
    assert len(seen) == len(plan.items)


@pytest.mark.parametrize(("given", "n_blocks"), [(4, 6), (None, 20)])
def test_score_blocks_taper_where_their_size_is_not_given(
    given: int | None, n_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_plan, "queries_per_block", lambda top_n, gflop_per_pair: 4)
    catalogue = make_catalogue(tmp_path / "images", 23)
    config = replace(WORK, queries_per_block=given)
    score_candidates(catalogue, make_lists(catalogue, 6), distance_model(), 5, tmp_path / "out", work=config)
    assert read_manifest(tmp_path / "out")["blocks"]["computed"] == 2 * n_blocks  # logits and rejects


def test_plan_rounds_stay_within_the_budget_and_hold_every_block(tmp_path: Path) -> None:
    lists = make_lists(make_catalogue(tmp_path, 40), 3)
    plan = scoring_plan.make_plan(lists, top_n=3, queries_per_block=2, images_per_batch=2)
    rounds = list(plan.rounds(range(len(plan.blocks)), 20))
    assert [number for now in rounds for number in now] == list(range(len(plan.blocks)))
    assert len(rounds) > 2
    assert max(len(plan.batches(now)) * 2 for now in rounds) <= 20


def test_common_candidates_bring_queries_together() -> None:
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 20))
    noise = np.random.default_rng(1).integers(1000, 9000, (200, 2))
    items = np.concatenate([groups[:, None] * 50 + np.arange(18), noise], axis=1)
    order = scoring_plan.by_common_candidates(items)
    changes = (np.diff(groups[order]) != 0).sum()
    assert sorted(order) == list(range(200))
    assert changes < 60 < (np.diff(groups) != 0).sum()


def test_plan_without_candidates_has_no_block() -> None:
    empty = empty_lists(torch.arange(0), 0)
    assert scoring_plan.make_plan(empty, top_n=5, queries_per_block=4, images_per_batch=3).blocks == ()
