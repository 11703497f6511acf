"""`Reranker` against the batch job, and what it refuses."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bits import assert_same
from online.examples import BROKEN, KINDS, N_IMAGES, TOP_N, save_example, write_lists, write_photos
from PIL import Image

from distributed_rerank import Reranker
from distributed_rerank.chain.chain import read_chain, write_chain
from distributed_rerank.config.evaluation import FirstStageConfig, RerankerConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.reranking.loading import load_model_and_chain
from distributed_rerank.reranking.rerank import rerank


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_example("token", tmp_path_factory.mktemp("token"))


def add_all(reranker: Reranker, photos: Path) -> dict[str, str]:
    return reranker.add([f"id {n:02d}" for n in range(N_IMAGES)], [photos.parent / f"{n}.png" for n in range(N_IMAGES)])


@pytest.mark.parametrize("rule", ["fuse", "replace"])
@pytest.mark.parametrize("kind", KINDS)
def test_order_and_bits_are_those_of_the_batch_job(kind: str, rule: str, photos: Path, tmp_path: Path) -> None:
    """Distance and probability of every candidate; the job's blocks and batches cut the work elsewhere."""
    folder = save_example(kind, tmp_path / "model", rule=rule)
    lists = write_lists(tmp_path / "lists.parquet")
    model, chain = load_model_and_chain(RerankerConfig(model=str(folder)))
    assert model is not None
    table = rerank(
        read_catalogue(str(photos)).as_query_and_gallery(),
        FirstStageConfig(candidates=tmp_path / "lists.parquet"),
        tmp_path / "out",
        model=model,
        chain=chain,
        work=WorkConfig(max_rejects=1.0, pairs_per_batch=22),
    ).to_pandas()
    reranker = Reranker.from_pretrained(folder, threads=2)
    assert sorted(add_all(reranker, photos)) == [f"id {n:02d}" for n in BROKEN]
    queries = sorted(set(lists["query_id"]))
    of_query = dict(iter(lists.groupby("query_id")))
    found = reranker.rank_many(
        [photos.parent / f"{int(query[3:])}.png" for query in queries],
        [of_query[query]["gallery_id"].tolist() for query in queries],
        [of_query[query]["distance"].to_numpy() for query in queries],
        top_k=None,
    )
    assert set(table["query_id"]) == set(queries)
    n_reordered = 0
    for query, matches in zip(queries, found, strict=True):
        rows = table[table["query_id"] == query]
        assert [match.id for match in matches] == rows["gallery_id"].tolist()
        assert_same([match.distance for match in matches], rows["distance"])
        assert_same([match.probability for match in matches], rows["probability"])
        n_reordered += rows["first_stage_rank"].tolist() != sorted(rows["first_stage_rank"])
    assert n_reordered > 20


def test_order_and_bits_are_those_of_the_command(token: Path, photos: Path, tmp_path: Path) -> None:
    """The same from a process of its own, from command to Parquet file."""
    lists = write_lists(tmp_path / "lists.parquet")
    command = [
        sys.executable, "-m", "distributed_rerank", "rerank", "--catalogue", str(photos), "--model", str(token),
        "--candidates", str(tmp_path / "lists.parquet"), "--out", str(tmp_path / "out"), "--max-rejects", "1",
        "--num-workers", "0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path / "out" / "reranked.parquet")
    reranker = Reranker.from_pretrained(token)
    add_all(reranker, photos)
    for query, rows in list(lists.groupby("query_id"))[:8]:
        matches = reranker.rank(
            photos.parent / f"{int(str(query)[3:])}.png", rows["gallery_id"].tolist(), rows["distance"].tolist(), None
        )
        expected = table[table["query_id"] == query]
        assert [match.id for match in matches] == expected["gallery_id"].tolist()
        assert_same([match.distance for match in matches], expected["distance"])


def test_distances_are_computed_where_none_are_given(token: Path, photos: Path, tmp_path: Path) -> None:
    """As the whole job with the model's own extractor computes them: the first stage's and the chain's."""
    readable = [n for n in range(N_IMAGES) if n not in BROKEN]
    table = pd.read_csv(photos)
    table = table[table["id"].isin([f"id {n:02d}" for n in readable])]
    table.assign(path=[str(photos.parent / path) for path in table["path"]]).to_csv(tmp_path / "df.csv", index=False)
    model, chain = load_model_and_chain(RerankerConfig(model=str(token)))
    assert model is not None
    job = rerank(
        read_catalogue(str(tmp_path / "df.csv")).as_query_and_gallery(),
        FirstStageConfig(extractor=KINDS["token"].extractor, n_items=N_IMAGES),
        tmp_path / "out",
        model=model,
        chain=chain,
    ).to_pandas()
    reranker = Reranker.from_pretrained(token)
    add_all(reranker, photos)
    for query in readable[:6]:
        rows = job[job["query_id"] == f"id {query:02d}"]
        others = [f"id {n:02d}" for n in readable if n != query]
        matches = reranker.rank(photos.parent / f"{query}.png", others, top_k=None)
        assert [match.id for match in matches] == rows["gallery_id"].tolist()
        assert_same([match.distance for match in matches], rows["distance"])


def test_a_photo_is_the_same_in_every_form(token: Path, photos: Path) -> None:
    reranker = Reranker.from_pretrained(token)
    add_all(reranker, photos)
    path, ids = photos.parent / "3.png", [f"id {n:02d}" for n in range(10, 20)]
    with Image.open(path) as picture:
        whole = ImageRef("", str(path), (0, 0, *picture.size))
        forms = [path, str(path), path.read_bytes(), picture, whole, reranker.encode(path), reranker.cached("id 03")]
        found = [reranker.rank(form, ids) for form in forms]
    assert all(matches == found[0] for matches in found)
    part = reranker.rank(ImageRef("", str(path), (0, 0, 12, 12)), ids)
    assert part != found[0]


@pytest.mark.parametrize("kind", ["token", "concat", "distance"])
def test_candidates_may_be_encodings(kind: str, photos: Path, tmp_path: Path) -> None:
    """All of them, or some beside ids, one of which cannot be read."""
    reranker = Reranker.from_pretrained(save_example(kind, tmp_path / "model"))
    add_all(reranker, photos)
    ids = [f"id {n:02d}" for n in (12, 40, 31, 3, 22, 9)]
    distances = [0.5, 0.25, 0.5, 1.0, 0.5, 0.75]
    query = photos.parent / "1.png"
    expected = reranker.rank(query, ids, distances, None)
    assert len(expected) == 5
    some = [(id, reranker.encode(photos.parent / f"{int(id[3:])}.png")) if id in ids[1::3] else id for id in ids]
    assert reranker.rank(query, some, distances, None) == expected
    whole = [(id, reranker.cached(id)) for id in ids if id != "id 31"]
    kept = [distance for id, distance in zip(ids, distances, strict=True) if id != "id 31"]
    assert reranker.rank(query, whole, kept, None) == reranker.rank(query, [id for id, _ in whole], kept, None)
    if kind == "token":
        assert reranker.rank(query, whole) == reranker.rank(query, [id for id, _ in whole])


def test_photo_of_too_many_pixels_is_refused(token: Path, photos: Path) -> None:
    reranker = Reranker.from_pretrained(token)
    with pytest.raises(BadInput, match="40 x 30 pixels exceed the limit of 1199"):
        reranker.encode(photos.parent / "1.png", max_pixels=1199)
    assert reranker.encode(photos.parent / "1.png", max_pixels=1200).encoded.isfinite().all()


def test_several_photos_of_a_query_are_averaged(token: Path, photos: Path) -> None:
    """With the rule `replace` and a full list the distance is the logit, so its mean can be seen."""
    reranker = Reranker.from_pretrained(token, chain="replace", top_n=20)
    add_all(reranker, photos)
    ids, distances = [f"id {n:02d}" for n in range(10, 20)], np.linspace(0, 1, 10).tolist()
    one, two = photos.parent / "1.png", photos.parent / "2.png"
    logits = [{match.id: match.distance for match in reranker.rank(q, ids, distances, None)} for q in (one, two)]
    both = reranker.rank([one, reranker.encode(two)], ids, distances, None)
    for match in both:
        assert match.distance == pytest.approx((logits[0][match.id] + logits[1][match.id]) / 2, abs=1e-6)
    assert reranker.rank([one, one], ids, distances) == reranker.rank(one, ids, distances)


def test_threads_get_the_answers_of_one(token: Path, photos: Path) -> None:
    reranker = Reranker.from_pretrained(token)
    add_all(reranker, photos)
    ids = [f"id {n:02d}" for n in range(20, 40) if n not in BROKEN]
    expected = [reranker.rank(photos.parent / f"{n}.png", ids) for n in range(4)]
    found: dict[tuple[int, int], object] = {}

    def ask(thread: int) -> None:
        for turn in range(12):
            n = (thread + turn) % 4
            found[thread, turn] = reranker.rank(photos.parent / f"{n}.png", ids) == expected[n]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 48
    assert all(found.values())


def test_steps_for_all_photos_are_left_out_and_their_curve_gives_the_probability(
    token: Path, photos: Path, tmp_path: Path
) -> None:
    chain = read_chain(token)
    (tmp_path / "chain.json").write_text(
        (token / "chain.json").read_text().replace(
            "}], \"cal", '}, {"step": "neighbourhood", "slope": 3.0, "intercept": 0.5}], "cal'
        )
    )  # fmt: skip
    longer = Reranker.from_pretrained(token, chain=tmp_path / "chain.json")
    shorter = Reranker.from_pretrained(token)
    assert longer.left_out.startswith("neighbourhood(")
    assert shorter.left_out == ""
    assert shorter.chain == chain
    ids = [f"id {n:02d}" for n in range(20, 30)]
    for reranker in (longer, shorter):
        add_all(reranker, photos)
    one, two = (reranker.rank(photos.parent / "1.png", ids) for reranker in (longer, shorter))
    assert [(match.id, match.distance) for match in one] == [(match.id, match.distance) for match in two]
    for match in one[: TOP_N - 1]:
        assert match.probability == pytest.approx(1 / (1 + np.exp(3.0 * match.distance - 0.5)), abs=1e-6)


def test_a_chain_of_the_first_stage_keeps_its_order(token: Path, photos: Path, tmp_path: Path) -> None:
    write_chain(type(read_chain(token))(calibration={"slope": 2.0, "intercept": 1.0}), tmp_path)
    reranker = Reranker.from_pretrained(token, chain=tmp_path / "chain.json")
    add_all(reranker, photos)
    matches = reranker.rank(photos.parent / "1.png", ["id 09", "id 07", "id 08"], [0.5, 0.25, 0.25])
    assert [match.id for match in matches] == ["id 07", "id 08", "id 09"]
    assert matches[2].probability == pytest.approx(0.5)


def test_the_callers_threads_and_gradients_are_left_alone(token: Path, photos: Path) -> None:
    torch.set_num_threads(2)
    try:
        reranker = Reranker.from_pretrained(token)
        add_all(reranker, photos)
        reranker.rank(photos.parent / "1.png", ["id 02", "id 03"])
        assert torch.get_num_threads() == 2
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["id 02", "id 02"], None), "'id 02' comes twice"),
        ((["id 02", "nobody"], None), "'nobody' is not in the cache; call add"),
        ((["id 02", "id 03"], [0.5]), "2 candidates but distances of shape (1,)"),
        ((["id 02"], [float("nan")]), "a distance is nan"),
    ],
)
def test_wrong_lists_are_refused(arguments: tuple, words: str, token: Path, photos: Path) -> None:
    reranker = Reranker.from_pretrained(token)
    add_all(reranker, photos)
    with pytest.raises(BadInput) as error:
        reranker.rank(photos.parent / "1.png", *arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_queries_and_models_are_refused(token: Path, photos: Path, tmp_path: Path) -> None:
    reranker = Reranker.from_pretrained(token)
    with pytest.raises(BadInput, match="photo cannot be read: not an image"):
        reranker.rank(photos.parent / "5.png", ["id 02"])
    with pytest.raises(BadInput, match="not as many images as ids"):
        reranker.add(["a", "b"], [photos.parent / "1.png"])
    with pytest.raises(BadInput, match="no photo; give at least one"):
        reranker.rank([], ["id 02"])
    with pytest.raises(BadInput, match="top_k=0"):
        reranker.rank(photos.parent / "1.png", ["id 02"], top_k=0)
    with pytest.raises(BadInput, match="no saved pairwise model"):
        Reranker.from_pretrained(tmp_path)
    assert reranker.rank(photos.parent / "1.png", []) == []
    folder = save_example("concat", tmp_path / "concat")
    concat = Reranker.from_pretrained(folder)
    add_all(concat, photos)
    with pytest.raises(BadInput, match="give rank\\(\\) those of the first stage"):
        concat.rank(photos.parent / "1.png", ["id 02"])
