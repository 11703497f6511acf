from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distributed_rerank import extraction
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import decoding, tables
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.images import UnreadableImage, read_image
from distributed_rerank.data.rejects import OUTAGE
from distributed_rerank.data.tables import embeddings_table, matrix_of
from distributed_rerank.errors import BadInput
from distributed_rerank.extraction import EmbeddedBlock, ImageBlock, embed
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.storage.artifacts import read_manifest
from tests.small_catalogue import EXTRACTOR, make_catalogue, save_picture

WORK = WorkConfig(images_per_block=3, images_per_batch=2)


def _file(folder: Path) -> bytes:
    return (folder / "embeddings.parquet").read_bytes()


def _backwards(
    blocks: list[ImageBlock], config: ExtractorConfig, work: WorkConfig
) -> Iterator[tuple[int, EmbeddedBlock]]:
    yield from reversed(list(extraction.embed_blocks(blocks, config, work)))


def test_embed_any_image_equals_the_extractor_on_it_alone(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 7)
    embeddings = embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK)
    extractor = build_extractor(EXTRACTOR)
    pixels = torch.stack([extractor.transform(read_image(ref)) for ref in catalogue.images()])
    with torch.no_grad():
        expected = torch.cat([extractor(one[None]) for one in pixels]).numpy()
    assert embeddings.ids.tolist() == catalogue.ids.tolist()
    np.testing.assert_allclose(embeddings.matrix, expected, rtol=1e-4, atol=1e-4)


def test_embed_blocks_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 8)
    embed(catalogue, EXTRACTOR, tmp_path / "forwards", work=WORK)
    embed(catalogue, EXTRACTOR, tmp_path / "backwards", work=WORK, executors=SimpleNamespace(embed_blocks=_backwards))
    assert _file(tmp_path / "forwards") == _file(tmp_path / "backwards")
    assert read_manifest(tmp_path / "forwards")["rows"] == 8


def test_embed_grown_catalogue_computes_only_what_is_missing(tmp_path: Path) -> None:
    embed(make_catalogue(tmp_path / "images", 5), EXTRACTOR, tmp_path / "out", work=WORK)
    asked: list[str] = []

    def spy(blocks: list[ImageBlock], config: ExtractorConfig, work: WorkConfig) -> Iterator[tuple[int, EmbeddedBlock]]:
        asked.extend(ref.id for _, refs in blocks for ref in refs)
        yield from extraction.embed_blocks(blocks, config, work)

    def embed_first(n: int) -> Embeddings:
        catalogue, executors = make_catalogue(tmp_path / "images", n), SimpleNamespace(embed_blocks=spy)
        return embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK, executors=executors)

    grown = embed_first(9)
    assert asked == [f"picture_{number:03d}.png" for number in range(5, 9)]
    assert len(grown.ids) == 9
    smaller = embed_first(2)
    assert len(smaller.ids) == 9
    assert len(asked) == 4


def test_embed_killed_after_two_blocks_continues_to_the_same_bytes(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 11)
    embed(catalogue, EXTRACTOR, tmp_path / "whole", work=WORK)

    def dies(
        blocks: list[ImageBlock], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        results = list(extraction.embed_blocks(blocks, config, work))
        yield results[0]
        yield results[2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(catalogue, EXTRACTOR, tmp_path / "killed", work=WORK, executors=SimpleNamespace(embed_blocks=dies))
    assert not (tmp_path / "killed").exists()
    embed(catalogue, EXTRACTOR, tmp_path / "killed", work=WORK)
    assert _file(tmp_path / "killed") == _file(tmp_path / "whole")
    # two stores, embeddings and rejects, of which two blocks each were there
    assert read_manifest(tmp_path / "killed")["blocks"] == {"computed": 4, "reused": 4}


def test_embed_lost_block_is_an_error(tmp_path: Path) -> None:
    def loses(
        blocks: list[ImageBlock], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        yield from list(extraction.embed_blocks(blocks, config, work))[1:]

    with pytest.raises(AssertionError, match="never came back"):
        embed(
            make_catalogue(tmp_path / "images", 7),
            EXTRACTOR,
            tmp_path / "out",
            work=WORK,
            executors=SimpleNamespace(embed_blocks=loses),
        )


def test_embed_lost_image_is_an_error(tmp_path: Path) -> None:
    def loses(
        blocks: list[ImageBlock], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        for number, block in extraction.embed_blocks(blocks, config, work):
            yield number, replace(block, ids=block.ids[1:], embeddings=block.embeddings[1:])

    with pytest.raises(AssertionError, match="other images"):
        embed(
            make_catalogue(tmp_path / "images", 7),
            EXTRACTOR,
            tmp_path / "out",
            work=WORK,
            executors=SimpleNamespace(embed_blocks=loses),
        )


def test_embed_broken_image_becomes_a_reject_with_its_reason(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 6, broken=(4,))
    embeddings = embed(catalogue, EXTRACTOR, tmp_path / "out", work=replace(WORK, max_rejects=0.2))
    (row,) = tables.read_table(tmp_path / "out" / "rejects.parquet", "rejects").to_pylist()
    assert row["id"] == "picture_004.png"
    assert row["stage"] == "embed"
    assert "not an image" in row["reason"]
    assert embeddings.rows_of(catalogue.ids).tolist() == [0, 1, 2, 3, -1, 4]


def test_embed_too_many_rejects_fails_and_goes_on_once_they_are_repaired(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 6, broken=(1, 4))
    with pytest.raises(BadInput, match=r"2 of 6 images .*picture_001.*rejects\.parquet"):
        embed(catalogue, EXTRACTOR, tmp_path / "out", work=replace(WORK, max_rejects=0.1))
    save_picture(tmp_path / "images" / "picture_001.png", 1)
    save_picture(tmp_path / "images" / "picture_004.png", 4)
    repaired = embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK)
    assert repaired.ids.tolist() == catalogue.ids.tolist()
    assert repaired.rejects == ()


def test_embed_other_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 3)
    embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK)
    other = replace(EXTRACTOR, image_size=48)
    with pytest.raises(BadInput, match="image_size"):
        embed(catalogue, other, tmp_path / "out")
    changed = embed(catalogue, other, tmp_path / "out", overwrite=True)
    assert changed.digest != embed(catalogue, EXTRACTOR, tmp_path / "first", work=WORK).digest


def test_embed_reads_rejects_again_once_and_never_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = make_catalogue(tmp_path / "images", 8, broken=(1, 4))
    reads: list[str] = []

    def counting(read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(ref: ImageRef, **options: Any) -> Any:
            reads.append(ref.id)
            return read(ref, **options)

        return counted

    for name in ("read_content", "read_image"):  # with their block, and again on their own
        monkeypatch.setattr(decoding, name, counting(getattr(decoding, name)))
    embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK)
    assert sorted(reads) == catalogue.ids.tolist(), "each image is read once"
    reads.clear()
    embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK)
    assert sorted(reads) == ["picture_001.png", "picture_004.png"]
    reads.clear()
    save_picture(tmp_path / "images" / "picture_001.png", 1)
    repaired = embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK)
    assert [reject.id for reject in repaired.rejects] == ["picture_004.png"]
    assert sorted(reads) == ["picture_001.png", "picture_001.png", "picture_004.png"]


def test_embed_image_that_is_back_between_two_looks_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that was away for a moment: the image cannot be read with its block, and can be a second later."""
    catalogue = make_catalogue(tmp_path / "images", 6)
    read_content, away = decoding.read_content, ["picture_002.png"]

    def sometimes(ref: ImageRef) -> bytes:
        if ref.id in away:
            away.remove(ref.id)
            raise UnreadableImage(f"{OUTAGE}: curlCode 7")
        return read_content(ref)

    monkeypatch.setattr(decoding, "read_content", sometimes)
    with pytest.raises(BadInput, match="1 of 6 images were not fetched, because their store does not answer"):
        embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK)
    assert embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK).ids.tolist() == catalogue.ids.tolist()


def test_embed_number_that_is_none_is_told_with_its_image_and_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = make_catalogue(tmp_path / "images", 6)
    embedder = extraction.Embedder.embed

    def broken(self: extraction.Embedder, pixels: Tensor) -> np.ndarray:
        found = embedder(self, pixels)
        if len(found) > 1:
            found[1, 3] = np.nan
        return found

    monkeypatch.setattr(extraction.Embedder, "embed", broken)
    with pytest.raises(BadInput, match=r"no finite embedding of image 'picture_001\.png' \(1 of "):
        embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK)
    assert not [path for path in tmp_path.rglob("*.parquet") if "reject" not in path.name and "out" in str(path)]


def test_embeddings_of_no_use_are_told(caplog: pytest.LogCaptureFixture) -> None:
    ids = np.array(["a", "b", "c"], dtype=object)
    extraction.tell_of_no_use(Embeddings(ids, np.eye(3, dtype=np.float32)))
    assert not caplog.text
    extraction.tell_of_no_use(Embeddings(ids, np.ones((3, 2), np.float32)))
    assert "ALL 3 IMAGES HAVE THE SAME EMBEDDING" in caplog.text
    extraction.tell_of_no_use(Embeddings(ids, np.eye(3, dtype=np.float32)[:, :2]))
    assert "1 EMBEDDINGS ARE ZERO, first that of 'c'" in caplog.text


@given(st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=4), st.integers(1, 5))
def test_sources_are_merged_in_the_order_of_their_ids(sources: list[list[int]], rows: int) -> None:
    numbers = {number: place for place, source in enumerate(sources) for number in source}
    tables_of = []
    for place in range(len(sources)):
        own = sorted(number for number, owner in numbers.items() if owner == place)
        whole = embeddings_table([f"{number:02d}" for number in own], np.array(own, np.float32).reshape(-1, 1))
        tables_of.append(iter([whole[start : start + rows] for start in range(0, len(own), rows)]))
    dim, parts = extraction._merged(tables_of)
    merged = list(parts)
    assert dim == 1
    assert [id for part in merged for id in part["id"].to_pylist()] == [f"{number:02d}" for number in sorted(numbers)]
    assert [value for part in merged for value in matrix_of(part)[:, 0].tolist()] == sorted(numbers)
