"""Neighbours against a literal full sort, for any tiling bit for bit, with ties, duplicates and sequences."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import candidate_pairs, knn
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.hardware import bf16_support
from distributed_rerank.tensors.knn import merge, nearest, search_tiles

CPU = torch.device("cpu")


@pytest.fixture(
    autouse=True,
    params=[
        "float32",
        pytest.param("bf16", marks=pytest.mark.skipif(bf16_support(CPU) is None, reason="no bf16 on this CPU")),
    ],
)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds for both products; bf16 is used for small ones too, and never given up for keeping too many."""
    if request.param == "float32":
        monkeypatch.setattr(knn, "bf16_support", lambda device: None)
    else:
        monkeypatch.setattr(knn, "SMALLEST_ROUNDED", 0)
        monkeypatch.setattr(candidate_pairs, "MOST_KEPT", 10**9)
    return request.param


def literal(
    queries: Tensor,
    gallery: Tensor,
    query_items: Tensor,
    gallery_items: Tensor,
    query_sequences: Tensor | None,
    gallery_sequences: Tensor | None,
    n_items: int,
) -> CandidateLists:
    items = np.full((len(queries), n_items), -1)
    distances = np.full((len(queries), n_items), np.inf, dtype=np.float32)
    for q in range(len(queries)):
        difference = gallery.numpy().astype(np.float64) - queries[q].numpy().astype(np.float64)
        row = np.sqrt((difference**2).sum(axis=1)).astype(np.float32)
        allowed = []
        for g in range(len(gallery)):
            is_self = query_items[q] == gallery_items[g]
            is_same_sequence = (
                query_sequences is not None
                and gallery_sequences is not None
                and query_sequences[q] >= 0
                and query_sequences[q] == gallery_sequences[g]
            )
            if not is_self and not is_same_sequence:
                allowed.append((row[g], int(gallery_items[g])))
        for place, (distance, item) in enumerate(sorted(allowed)[:n_items]):
            items[q, place], distances[q, place] = item, distance
    return CandidateLists(query_items, torch.from_numpy(items), torch.from_numpy(distances))


def assert_same(found: CandidateLists, expected: CandidateLists) -> None:
    assert torch.equal(found.query_items, expected.query_items)
    assert torch.equal(found.items, expected.items)
    assert torch.equal(found.distances, expected.distances)


def embeddings_of(kind: str, n: int, generator: torch.Generator) -> Tensor:
    if kind == "ties":
        return torch.randint(0, 3, (n, 4), generator=generator).float()
    if kind == "duplicates":
        return torch.randn(7, 16, generator=generator)[torch.randint(0, 7, (n,), generator=generator)]
    if kind == "close":
        return 100 + 1e-3 * torch.randn(n, 24, generator=generator)
    if kind == "tiny":
        return 1e-24 * torch.randn(n, 5, generator=generator)
    return torch.randn(n, 33, generator=generator)


@pytest.mark.parametrize("kind", ["random", "ties", "duplicates", "close", "tiny"])
@pytest.mark.parametrize("has_sequences", [False, True])
@pytest.mark.parametrize("n_items", [1, 7, 40, 400])
def test_nearest_equals_a_full_sort(kind: str, has_sequences: bool, n_items: int) -> None:
    generator = torch.Generator().manual_seed(n_items)
    embeddings = embeddings_of(kind, 300, generator)
    order = torch.randperm(300, generator=generator)
    query_items, gallery_items = order[:60], order[40:]
    sequences = torch.randint(-1, 25, (300,), generator=generator)
    q_seq, g_seq = (sequences[query_items], sequences[gallery_items]) if has_sequences else (None, None)
    queries, gallery = embeddings[query_items], embeddings[gallery_items]
    found = nearest(
        queries,
        gallery,
        query_items=query_items,
        gallery_items=gallery_items,
        query_sequences=q_seq,
        gallery_sequences=g_seq,
        n_items=n_items,
        query_block=23,
    )
    assert_same(found, literal(queries, gallery, query_items, gallery_items, q_seq, g_seq, n_items))


@pytest.mark.parametrize("kind", ["random", "ties", "close"])
def test_nearest_any_tiling_and_tile_order_gives_the_same_bits(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    embeddings = embeddings_of(kind, 210, generator)
    items, sequences = torch.arange(210), torch.arange(210) // 4
    whole = nearest(
        embeddings,
        embeddings,
        query_items=items,
        gallery_items=items,
        query_sequences=sequences,
        gallery_sequences=sequences,
        n_items=12,
    )
    for tile_size, query_block, gallery_slice in [
        (210, 1, 210),
        (210, 97, 50),
        (33, 64, 1000),
        (90, 210, 7),
    ]:
        tiles = [(embeddings[part], part, sequences[part]) for part in items.split(tile_size)]
        for ordered in (tiles, tiles[::-1]):
            found = search_tiles(
                embeddings,
                ordered,
                query_items=items,
                query_sequences=sequences,
                n_items=12,
                query_block=query_block,
                gallery_slice=gallery_slice,
            )
            assert_same(found, whole)


def test_nearest_large_slice_with_groups_of_32_equals_a_full_sort() -> None:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(40, 12, generator=generator)
    gallery = centres.repeat_interleave(100, 0) + 0.01 * torch.randn(4000, 12, generator=generator)
    queries = gallery[::333].clone()
    query_items, gallery_items = torch.arange(4000)[::333], torch.arange(4000)
    found = nearest(queries, gallery, query_items=query_items, gallery_items=gallery_items, n_items=25)
    assert_same(found, literal(queries, gallery, query_items, gallery_items, None, None, 25))


def test_merge_any_order_and_grouping_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    embeddings = embeddings_of("ties", 90, generator)
    items = torch.arange(90)
    parts = [
        nearest(embeddings, embeddings[p], query_items=items, gallery_items=items[p], n_items=8)
        for p in (slice(0, 5), slice(5, 50), slice(50, 90))
    ]
    whole = nearest(embeddings, embeddings, query_items=items, gallery_items=items, n_items=8)
    for a, b, c in itertools.permutations(parts):
        assert_same(merge(merge(a, b, 8), c, 8), whole)
        assert_same(merge(a, merge(b, c, 8), 8), whole)


def test_nearest_duplicates_of_the_query_are_found_but_never_the_query_itself() -> None:
    embeddings = torch.ones(6, 3)
    found = nearest(embeddings, embeddings, query_items=torch.arange(6), gallery_items=torch.arange(6), n_items=10)
    assert (found.distances[:, :5] == 0).all()
    assert (found.items[:, 5:] == -1).all()
    assert (found.distances[:, 5:] == torch.inf).all()
    for item in range(6):
        assert found.items[item, :5].tolist() == [other for other in range(6) if other != item]


def conformance_3(queries: list[int], gallery: list[int], sequence: list[int] | None, n_items: int) -> list[list[int]]:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    q, g = torch.tensor(queries), torch.tensor(gallery)
    s = None if sequence is None else torch.tensor(sequence)
    found = nearest(
        x[q],
        x[g],
        query_items=q,
        gallery_items=g,
        query_sequences=None if s is None else s[q],
        gallery_sequences=None if s is None else s[g],
        n_items=n_items,
    )
    return [[item for item in row if item >= 0] for row in found.items.tolist()]


def test_nearest_conformance_case_3_gives_oml_rows_with_ties_by_item() -> None:
    everything = [0, 1, 2, 3, 4]
    assert conformance_3([0, 2, 4], everything, None, 100) == [[1, 2, 3, 4], [1, 3, 0, 4], [3, 2, 1, 0]]
    # OML answers in gallery positions (query 0 -> [0, 1]); ours are item numbers.
    assert conformance_3([0, 2], [1, 3, 4], None, 2)[0] == [1, 3]
    assert conformance_3([0, 2, 4], everything, [0, 0, 1, 1, 2], 100) == [[2, 3, 4], [1, 0, 4], [3, 2, 1, 0]]
    assert conformance_3([0, 2, 4], everything, [7] * 5, 100) == [[], [], []]


def test_nearest_conformance_case_4_one_query_works_and_short_rows_are_filled() -> None:
    assert conformance_3([2], [0, 1, 2, 3, 4], None, 100) == [[1, 3, 0, 4]]
    assert conformance_3([2], [2], None, 100) == [[]]


def test_nearest_conformance_case_10_one_cmc_for_every_n_items() -> None:
    random = np.random.RandomState(0)
    x = torch.from_numpy(random.randint(0, 2, (64, 3)).astype(np.float32))
    labels = torch.from_numpy(random.randint(0, 4, 64))
    items = torch.arange(64)
    hits = set()
    for n_items, query_block, gallery_slice in itertools.product((1, 5, 10, 20, 63), (1, 64), (5, 64)):
        found = nearest(
            x,
            x,
            query_items=items,
            gallery_items=items,
            n_items=n_items,
            query_block=query_block,
            gallery_slice=gallery_slice,
        )
        hits.add(float((labels[found.items[:, 0]] == labels).double().mean()))
    assert len(hits) == 1
    distances = torch.cdist(x, x).fill_diagonal_(torch.inf)
    is_first = distances == distances.amin(dim=1, keepdim=True)
    is_hit = labels[:, None] == labels
    best = float((is_first & is_hit).any(dim=1).double().mean())
    worst = float((~(is_first & ~is_hit).any(dim=1)).double().mean())
    assert worst <= hits.pop() <= best


def test_nearest_empty_sides_give_empty_or_filled_rows() -> None:
    none, some = torch.empty(0, 3), torch.ones(2, 3)
    no_items, items = torch.empty(0, dtype=torch.int64), torch.arange(2)
    assert nearest(none, some, query_items=no_items, gallery_items=items, n_items=4).items.shape == (0, 4)
    filled = nearest(some, none, query_items=items, gallery_items=no_items, n_items=4)
    assert (filled.items == -1).all()
    assert filled.items.shape == (2, 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e19])
def test_nearest_embedding_not_finite_names_the_item(bad: float) -> None:
    good, broken = torch.zeros(3, 2), torch.zeros(3, 2)
    broken[1, 0] = bad
    items, others = torch.arange(3), torch.tensor([40, 41, 42])
    with pytest.raises(BadInput, match="item 41 "):
        nearest(good, broken, query_items=items, gallery_items=others, n_items=2)
    with pytest.raises(BadInput, match="item 41 "):
        nearest(broken, good, query_items=others, gallery_items=items, n_items=2)


def test_nearest_n_items_below_one_is_bad_input() -> None:
    with pytest.raises(BadInput, match="n_items=0"):
        nearest(
            torch.ones(1, 2),
            torch.ones(1, 2),
            query_items=torch.tensor([0]),
            gallery_items=torch.tensor([1]),
            n_items=0,
        )


def test_nearest_bf16_product_that_keeps_too_many_leaves_the_choice_to_float32(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(1 + 1e-3 * torch.randn(3000, 32, generator=generator), dim=1)
    monkeypatch.setattr(candidate_pairs, "MOST_KEPT", 4)
    by_float32 = []
    real = candidate_pairs._pairs_by_float32
    monkeypatch.setattr(candidate_pairs, "_pairs_by_float32", lambda *args: by_float32.append(1) or real(*args))
    items = torch.arange(3000)
    found = nearest(embeddings[:20], embeddings, query_items=items[:20], gallery_items=items, n_items=5)
    assert by_float32, "bf16 cannot tell these apart"
    assert_same(found, literal(embeddings[:20], embeddings, items[:20], items, None, None, 5))


@pytest.mark.skipif(bf16_support(CPU) is None, reason="no bf16 on this CPU")
def test_nearest_bf16_product_keeps_few_pairs_of_ordinary_embeddings(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is of use: not many more exact distances than neighbours."""
    if product != "bf16":
        pytest.skip("of bf16 only")
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(20_100, 128, generator=generator)
    kept = []
    real = knn._first_of_each_row
    monkeypatch.setattr(knn, "_first_of_each_row", lambda rows, *given: kept.append(len(rows)) or real(rows, *given))
    items = torch.arange(20_100)
    nearest(embeddings[:100], embeddings[100:], query_items=items[:100], gallery_items=items[100:], n_items=50)
    assert 100 * 50 <= sum(kept) <= 2 * 100 * 50
