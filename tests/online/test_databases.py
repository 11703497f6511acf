"""The recipes of docs/databases.md on real engines: their first stage is ours, and so is the re-ranked order."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from online.examples import save_example
from small_catalogue import save_picture

from distributed_rerank import Reranker
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.knn import nearest

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "databases.md").read_text(encoding="utf-8")
N_PHOTOS, N_QUERIES, N_FOUND = 300, 200, 50
NEAR = 1e-5
"""Distances closer than this are a tie: the engines add up float32 in another order."""
ENGINES = {"Qdrant": "qdrant_client", "LanceDB": "lancedb"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A re-ranker of 300 photos, and each query's 50 nearest by our exact search."""
    folder = tmp_path_factory.mktemp("photos")
    ids = [f"photo {number:03d}" for number in range(N_PHOTOS)]
    for number in range(N_PHOTOS):
        save_picture(folder / f"{number}.png", number)
    model = save_example("token", tmp_path_factory.mktemp("model"), top_n=N_FOUND)
    reranker = Reranker.from_pretrained(model)
    assert reranker.add(ids, [folder / f"{number}.png" for number in range(N_PHOTOS)]) == {}
    queries = [reranker.cached(id) for id in ids[:N_QUERIES]]
    vectors = torch.stack([reranker.cached(id).embedding for id in ids])  # pyright: ignore
    lists = nearest(
        vectors[:N_QUERIES], vectors, query_items=torch.full((N_QUERIES,), -2), gallery_items=torch.arange(N_PHOTOS),
        n_items=N_FOUND,
    )  # fmt: skip
    return SimpleNamespace(ids=ids, reranker=reranker, queries=queries, vectors=vectors.numpy(), lists=lists)


def recipe(title: str) -> tuple[str, str]:
    """The Python of a section: what is done once, and the lines of one query."""
    section = GUIDE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    lines = code.splitlines()
    first = next(number for number, line in enumerate(lines) if re.match(r"(points|hits|best) = .*query", line))
    return "\n".join(lines[:first]), "\n".join(lines[first:])


def run(title: str, setting: SimpleNamespace, folder: Path, n_queries: int) -> list[dict[str, Any]]:
    """The names that the recipe has set, for each query."""
    once, each = recipe(title)
    assert once
    names: dict[str, Any] = {
        "ids": setting.ids, "vectors": list(setting.vectors), "reranker": setting.reranker
    }  # fmt: skip
    exec(once.replace('"lancedb"', repr(str(folder / "lance"))), names)
    found = []
    for query in setting.queries[:n_queries]:
        exec(each, names | {"query": query}, own := dict[str, Any]())
        found.append(own)
    return found


def assert_same_apart_from_ties(ours: Sequence[str], keys: np.ndarray, theirs: Sequence[str]) -> None:
    """Equal ids, where those whose `keys` (ascending) follow each other within NEAR may stand in any order."""
    ends = [*(place for place in range(1, len(ours)) if keys[place] - keys[place - 1] > NEAR), len(ours)]
    start = 0
    for end in ends:
        assert sorted(ours[start:end]) == sorted(theirs[start:end])
        start = end


@pytest.mark.parametrize("engine", ENGINES)
def test_order_of_an_engine_is_ours_and_so_is_the_reranked_one(
    engine: str, setting: SimpleNamespace, tmp_path: Path
) -> None:
    """200 queries: the first stage apart from ties, the re-ranked order exactly, scores included."""
    pytest.importorskip(ENGINES[engine], reason=f"{engine} is absent: pip install {ENGINES[engine]}")
    answers = run(engine, setting, tmp_path, N_QUERIES)
    assert len(answers) == N_QUERIES
    n_moved = n_ties = 0
    for number, answer in enumerate(answers):
        items, keys = setting.lists.items[number].tolist(), setting.lists.distances[number].numpy()
        ours = [setting.ids[item] for item in items]
        assert ours[0] == setting.ids[number]
        assert_same_apart_from_ties(ours, keys, answer["found"])
        np.testing.assert_allclose(answer["distances"][1:], keys[1:], atol=NEAR)
        n_ties += int((np.diff(keys) <= NEAR).sum())
        query = setting.queries[number]
        expected = setting.reranker.rank(query, ours, None, None)
        assert setting.reranker.rank(query, answer["found"], None, None) == expected
        n_moved += [match.id for match in expected] != ours
        given = setting.reranker.rank(query, answer["found"], answer["distances"], None)
        by_engine = np.array([match.distance for match in given])
        np.testing.assert_allclose(by_engine, [match.distance for match in expected], atol=1e-3)
    assert n_moved > N_QUERIES // 2, "the model left the order as it was: nothing is shown"
    assert n_ties < N_QUERIES * N_FOUND // 20, "most places are ties: nothing is shown"


def test_multivectors_of_an_engine_give_maxsim(setting: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("qdrant_client", reason="Qdrant is absent: pip install qdrant_client")
    tokens = np.stack([setting.reranker.token_vectors(setting.reranker.cached(id))[0] for id in setting.ids])
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), 1, atol=1e-3)
    # [query, photo]: float64
    sums = np.einsum("qtd,pud->qptu", tokens[:20].astype(np.float64), tokens).max(axis=-1).sum(axis=-1)
    for number, answer in enumerate(run("Token vectors as multivectors", setting, tmp_path, 20)):
        order = np.argsort(-sums[number], kind="stable")[:N_FOUND]
        assert_same_apart_from_ties([setting.ids[item] for item in order], -sums[number][order], answer["found"])


def test_model_without_tokens_says_so(tmp_path: Path) -> None:
    save_picture(tmp_path / "1.png", 1)
    reranker = Reranker.from_pretrained(save_example("distance", tmp_path / "model"))
    with pytest.raises(BadInput, match="has no token vectors"):
        reranker.token_vectors(reranker.encode(tmp_path / "1.png"))
