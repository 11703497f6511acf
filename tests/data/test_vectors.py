"""Embeddings that are read in place: the same rows as any Parquet reader gives, and what is not read so."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_rerank.data import vectors
from distributed_rerank.data.embeddings import Embeddings, read_embeddings
from distributed_rerank.data.tables import embeddings_table, write_embeddings
from distributed_rerank.data.texts import Texts
from distributed_rerank.data.vectors import StoredVectors, stored_vectors, write_vectors
from distributed_rerank.errors import BadInput
from distributed_rerank.extraction import embeddings_of_others
from distributed_rerank.reranking.known_distances import extractor_settings
from distributed_rerank.storage.manifests import check_folder, write_manifest

IDS = [f"{number:03d}" for number in range(50)]
MATRIX = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "ROWS_PER_GROUP", 16)


def test_rows_in_place_are_those_that_pandas_reads(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e.parquet", IDS, MATRIX)
    table = pd.read_parquet(tmp_path / "e.parquet")
    assert table["id"].tolist() == IDS
    assert np.array_equal(np.stack(table["embedding"].to_list()), MATRIX)
    stored = stored_vectors([tmp_path / "e.parquet"])
    assert stored is not None, "it was written to be read in place"
    rows = np.array([49, 0, 16, 15, 16, 31, 32])
    for found in (stored, pickle.loads(pickle.dumps(stored))):
        assert (len(found), found.shape) == (50, (50, 5))
        assert np.array_equal(found[rows], MATRIX[rows])
        assert np.array_equal(found[14:33], MATRIX[14:33])
        assert np.array_equal(np.asarray(found), MATRIX)
    assert [part.to_pylist() for part in stored.id_parts()] == [IDS[:16], IDS[16:32], IDS[32:48], IDS[48:]]


def test_a_file_is_the_same_however_its_rows_came(tmp_path: Path) -> None:
    whole = embeddings_table(IDS, MATRIX)
    for name, cuts in (("one", [0, 50]), ("many", [0, 1, 15, 33, 34, 50])):
        parts = (whole[start:stop] for start, stop in itertools.pairwise(cuts))
        write_vectors(tmp_path / name, 5, parts)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


@pytest.mark.parametrize("now", ["more rows", "other values", "no table", "nothing"])
def test_rows_of_a_file_that_was_replaced_are_refused(tmp_path: Path, now: str) -> None:
    """Another run adds to the embeddings that this one reads: its row numbers are those of the file of before."""
    path = tmp_path / "e.parquet"
    write_embeddings(path, IDS, MATRIX)
    stored = read_embeddings(path)
    assert isinstance(stored.matrix, StoredVectors)
    away = pickle.dumps(stored.matrix)
    if now == "nothing":
        path.unlink()
    elif now == "no table":
        path.write_bytes(b"PAR1")
    elif now == "other values":
        write_embeddings(path, IDS, MATRIX + 1)
    else:
        order = np.argsort([*IDS, "0005"])
        write_embeddings(path, sorted([*IDS, "0005"]), np.append(MATRIX, MATRIX[:1], axis=0)[order])
    for vectors_of in (stored.matrix, pickle.loads(away)):
        for read in (lambda v: v[3:4], lambda v: v[np.array([49])], lambda v: list(v.id_parts()), np.asarray):
            with pytest.raises(BadInput, match=r"e\.parquet: another run has changed these embeddings"):
                read(vectors_of)
    # The same rows written anew, by a run that had nothing to add, are the same file.
    write_embeddings(path, IDS, MATRIX)
    assert np.array_equal(pickle.loads(away)[:], MATRIX)


@pytest.mark.parametrize("change", ["compressed", "many pages", "unsorted", "float64", "numbers", "not finite", "list"])
def test_other_tables_give_the_same_embeddings_from_memory(tmp_path: Path, change: str) -> None:
    order = np.arange(50)[::-1] if change == "unsorted" else np.arange(50)
    table = embeddings_table([IDS[row] for row in order], MATRIX[order])
    layout = {} if change in ("compressed", "many pages") else dict(vectors.LAYOUT)
    layout |= {"compression": "none", "data_page_size": 100, "write_batch_size": 1} if change == "many pages" else {}
    if change in ("float64", "list"):
        kind = pa.list_(pa.float64(), 5) if change == "float64" else pa.list_(pa.float32())
        table = table.set_column(1, "embedding", table["embedding"].cast(kind))
    if change == "numbers":
        table = table.set_column(0, "id", pa.array(np.arange(50)))
    if change == "not finite":
        table = embeddings_table(IDS, np.where(np.arange(5) == 4, np.float32(np.nan), MATRIX))
    pq.write_table(table, tmp_path / "e.parquet", **layout)
    assert stored_vectors([tmp_path / "e.parquet"]) is None
    if change != "not finite":
        found = read_embeddings(tmp_path / "e.parquet")
        ids = sorted(map(str, range(50))) if change == "numbers" else IDS
        assert found.ids.tolist() == ids
        assert np.array_equal(found.matrix, MATRIX[[int(id) for id in ids]])


def embedded(folder: Path) -> Path:
    """A finished folder as `embed` leaves it; returns the file of its embeddings."""
    write_embeddings(folder / "embeddings.parquet", IDS, MATRIX)
    write_manifest(folder, {"fingerprint": {"stage": "embed", "config": {"extractor": {"name": "a"}}}})
    return folder / "embeddings.parquet"


@pytest.mark.parametrize("given", ["folder", "file"])
def test_embeddings_that_another_program_has_written_anew_are_read_and_told(
    given: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that tunes them reads the table and writes it back; ids may come in any order."""
    file = embedded(tmp_path)
    assert extractor_settings(tmp_path) == {"name": "a"}
    assert embeddings_of_others(tmp_path) is None
    old = pq.read_table(file)
    tuned = pa.FixedSizeListArray.from_arrays(pa.array(2 * MATRIX.ravel()), 5)
    pq.write_table(old.set_column(1, old.schema.field(1), tuned).take(list(range(49, -1, -1))), file)
    found = read_embeddings(tmp_path if given == "folder" else file)
    assert (found.ids.tolist(), np.array_equal(found.matrix, 2 * MATRIX)) == (IDS, True)
    assert "another program has written the embeddings anew after embed" in caplog.text
    assert extractor_settings(tmp_path) is None, "nobody knows what made these"
    others = embeddings_of_others(tmp_path)
    assert others is not None
    assert others.digest == found.digest
    with pytest.raises(BadInput, match=r"embeddings\.parquet has \d+ bytes, \d+ were written"):
        check_folder(tmp_path)  # as embed does, which would add to it


@pytest.mark.parametrize("damage", ["cut off", "longer", "empty", "a bit", "of another run", "one row less"])
def test_damaged_embeddings_are_not_taken_for_another_programs(damage: str, tmp_path: Path) -> None:
    file = embedded(tmp_path)
    whole = file.read_bytes()
    if damage == "of another run":
        write_embeddings(file, [f"{id}x" for id in IDS], MATRIX)
    elif damage == "one row less":
        write_embeddings(file, IDS[1:], MATRIX[1:])
    else:
        changed = {"cut off": whole[:-1], "longer": whole + b"0", "empty": b""}
        file.write_bytes(changed.get(damage, whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]))
    for given in (tmp_path, file):
        with pytest.raises(BadInput, match=r"bytes, \d+ were written|has changed since it was written"):
            read_embeddings(given)
    assert embeddings_of_others(tmp_path) is None


def test_stored_and_held_embeddings_are_alike(tmp_path: Path) -> None:
    held = Embeddings(IDS, MATRIX)
    write_embeddings(tmp_path / "e.parquet", IDS, MATRIX)
    stored = read_embeddings(tmp_path / "e.parquet")
    assert isinstance(stored.matrix, StoredVectors)
    assert stored.digest == held.digest
    wanted = Texts(["", "003", "017", "018", "049", "05"])
    assert stored.rows_of(wanted).tolist() == held.rows_of(wanted).tolist() == [-1, 3, 17, 18, 49, -1]
    assert np.array_equal(np.concatenate(list(stored.blocks())), MATRIX)
    mapped = [
        one.mapped(lambda x: 2 * x[:, :3], tmp_path / name / "m.parquet")
        for name, one in (("of stored", stored), ("of held", held))
    ]
    for found in mapped:
        assert found.ids.tolist() == IDS
        assert np.array_equal(np.asarray(found.matrix), 2 * MATRIX[:, :3])
