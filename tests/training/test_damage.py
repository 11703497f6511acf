"""A damaged byte in any file of an unfinished training is found, and the model is that of an undisturbed run."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_examples import build_task

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import begun
from distributed_rerank.storage.files import is_intact
from distributed_rerank.training import run as training_run
from distributed_rerank.training.encodings import holds_model
from distributed_rerank.training.run import CHECKPOINTS, fit
from distributed_rerank.training.state import latest, saved_epochs
from distributed_rerank.training.task import TrainingTask
from distributed_rerank.training.tracking import copy_event_files, has_its_checksums


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainingTask:
    return build_task(tmp_path_factory.mktemp("task"), epochs=2)


@pytest.fixture(scope="module")
def whole(task: TrainingTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fit(task, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(task: TrainingTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was stopped after its fourth epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    kept, seen = training_run.keep_state, []

    def stops(state: dict[str, Any], into: Path) -> None:
        kept(state, into)
        seen.append(into)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "keep_state", stops)
        with pytest.raises(KeyboardInterrupt):
            fit(task, folder)
    assert saved_epochs(folder / CHECKPOINTS) == [3, 4]
    return folder


KINDS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "state": ("checkpoints/epoch-00004.pt", is_intact),
    "digest of a state": ("checkpoints/epoch-00004.pt.sha256", lambda path: is_intact(path.with_suffix(""))),
    "encodings": ("encodings/encodings/view-00/block-00000001.pt", is_intact),
    "features": ("encodings/features/view-00/block-00000000.pt", is_intact),
    "weights": ("encodings/encoder-1/model.safetensors", lambda path: holds_model(path.parent)),
    "config": ("encodings/encoder-all/config.json", lambda path: holds_model(path.parent)),
    "manifest": ("encodings/encoder-0/manifest.json", lambda path: holds_model(path.parent)),
}


def _damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_byte_is_found_and_the_training_ends_with_the_same_weights(
    task: TrainingTask, whole: dict[str, Any], stopped: Path, tmp_path: Path, kind: str
) -> None:
    """torch.load alone finds 4 of 100."""
    name, is_whole = KINDS[kind]
    places = np.random.default_rng(0).integers(0, (stopped / name).stat().st_size, 25)
    for number, place in enumerate(places.tolist()):
        folder = tmp_path / str(number) / "run"
        shutil.copytree((stopped / name).parent, (folder / name).parent)
        assert is_whole(folder / name)
        _damage(folder / name, place)
        assert not is_whole(folder / name), place
    shutil.copytree(stopped, tmp_path / "out")
    _damage(tmp_path / "out" / name, places[0])
    state = fit(task, tmp_path / "out")
    for result, expected in zip(training_run.results(state), training_run.results(whole), strict=True):
        assert [entry["loss"] for entry in result["history"]] == [entry["loss"] for entry in expected["history"]]
        for key, value in expected["best"]["model"].items():
            assert np.array_equal(result["best"]["model"][key].numpy(), value.numpy()), key


def test_state_that_is_damaged_or_cut_off_gives_way_to_the_one_before(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(stopped / CHECKPOINTS, tmp_path / CHECKPOINTS)
    last = folder / "epoch-00004.pt"
    last.write_bytes(last.read_bytes()[:-1])
    assert latest(folder) == folder / "epoch-00003.pt"
    assert f"{last} is damaged" in caplog.text
    assert (folder / "epoch-00004.pt.damaged").is_file()
    (folder / "epoch-00003.pt.sha256").unlink()
    assert latest(folder) is None


def test_note_of_what_the_run_was_begun_with_is_never_misread(stopped: Path, tmp_path: Path) -> None:
    text = (stopped / begun.BEGUN).read_bytes()
    assert begun.recall(stopped)["device"]
    for place in range(len(text)):
        (tmp_path / begun.BEGUN).write_bytes(text[:place] + bytes([text[place] ^ 4]) + text[place + 1 :])
        with pytest.raises(BadInput, match="damaged"):
            begun.recall(tmp_path)


def test_damaged_event_files_are_left_out_by_name(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shutil.copytree(stopped / "tensorboard", tmp_path / "source")
    path, other = sorted(source.rglob("events.*"))[:2]
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        _damage(path, place)
        assert not has_its_checksums(path), place
        path.write_bytes(content)
    path.write_bytes(content[:-3])
    assert has_its_checksums(path), "a kill cuts records off"
    _damage(path, 3)
    with caplog.at_level(logging.WARNING):
        copy_event_files(source, tmp_path / "target")
    assert f"{path} is damaged" in caplog.text
    assert not (tmp_path / "target" / path.relative_to(source)).exists()
    assert (tmp_path / "target" / other.relative_to(source)).read_bytes() == other.read_bytes()
