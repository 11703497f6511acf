"""Checkpoints: whole or absent, the newest one found, the oldest ones removed."""

from pathlib import Path

import torch

from distributed_rerank.training.checkpoints import load_latest, save_epoch, saved_epochs


def test_load_latest_gives_back_what_was_saved_last(tmp_path: Path) -> None:
    for epoch in (1, 2, 10):
        save_epoch({"weights": torch.full((3,), float(epoch)), "history": [{"loss": 0.5}]}, tmp_path, epoch)
    found = load_latest(tmp_path)
    assert found is not None
    assert found["weights"].tolist() == [10.0, 10.0, 10.0]
    assert found["history"] == [{"loss": 0.5}]
    assert saved_epochs(tmp_path) == [2, 10]


def test_load_latest_ignores_an_unfinished_file(tmp_path: Path) -> None:
    save_epoch({"epoch": 1}, tmp_path, 1)
    (tmp_path / ".epoch-00002.pt.77.tmp").write_bytes(b"half of a checkp")
    assert load_latest(tmp_path) == {"epoch": 1}


def test_load_latest_of_an_absent_folder_is_nothing(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
