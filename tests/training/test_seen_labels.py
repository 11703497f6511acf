"""Labels that the extractor has seen: found, said, or in its weights file; they are no evidence for a chain."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from training_examples import BACKBONE

from distributed_rerank.config.training import EvidenceConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.models.saving import save_extractor
from distributed_rerank.models.weights import label_digest, read_state_dict, seen_labels
from distributed_rerank.training.seen_labels import LabelsToUse, pick_labels

N_LABELS, DIM = 60, 48


def catalogue_of(counts: dict[str, list[int]]) -> Catalogue:
    """A catalogue with labels of so many images in each split; labels are numbered through all splits."""
    rows, label = [], 0
    for split, sizes in counts.items():
        for size in sizes:
            rows += [(f"{split}-{label:03d}-{image:02d}", str(label), split) for image in range(size)]
            label += 1
    table = pd.DataFrame(rows, columns=["id", "label", "split"])
    table = table.assign(path=table["id"], is_query=True, is_gallery=True).sort_values("id", ignore_index=True)
    return Catalogue(table, "planted.csv")


def embeddings_of(catalogue: Catalogue, spread: dict[str, float], seed: int = 0) -> Embeddings:
    """Points around a centre for each label, with a spread for each split, in id order."""
    state = np.random.default_rng(seed)
    centres = state.standard_normal((int(catalogue.labels.max()) + 1, DIM))
    noise = state.standard_normal((len(catalogue), DIM)) * catalogue.table["split"].map(spread).to_numpy()[:, None]
    points = centres[catalogue.labels] + noise
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    return Embeddings(catalogue.ids, unit.astype(np.float32))


def picked(catalogue: Catalogue, embeddings: Embeddings, config: EvidenceConfig | None = None) -> LabelsToUse:
    return pick_labels(catalogue, None, config or EvidenceConfig(), lambda images: embeddings)


@pytest.mark.parametrize("sizes", [[3] * N_LABELS, [8] * N_LABELS])
@pytest.mark.parametrize("seed", [0, 1])
def test_embeddings_that_know_the_train_labels_are_found(sizes: list[int], seed: int) -> None:
    catalogue = catalogue_of({"train": sizes, "validation": [6] * N_LABELS})
    used = picked(catalogue, embeddings_of(catalogue, {"train": 0.3, "validation": 1.2}, seed))
    assert not used.is_valid
    assert "--calibration-split" in used.note["text"]
    assert used.note["seen"] == N_LABELS


@pytest.mark.parametrize(
    ("train", "validation"),
    [([3] * 60, [3] * 60), ([3] * 60, [12] * 40), ([12] * 40, [3] * 60), ([8] * 4, [8] * 60), ([2] * 60, [2] * 60)],
)
@pytest.mark.parametrize("spread", [0.2, 0.5, 0.8, 1.2])
def test_embeddings_that_know_no_labels_are_not_suspected(
    train: list[int], validation: list[int], spread: float
) -> None:
    catalogue = catalogue_of({"train": train, "validation": validation})
    used = picked(catalogue, embeddings_of(catalogue, {"train": spread, "validation": spread}))
    assert used.is_valid
    assert set(used.images.table["split"]) == {"train"}
    assert used.note["text"] == ""


def test_what_the_user_says_comes_before_what_is_found() -> None:
    catalogue = catalogue_of({"train": [3] * N_LABELS, "validation": [6] * N_LABELS})
    tuned = embeddings_of(catalogue, {"train": 0.2, "validation": 1.2})
    assert picked(catalogue, tuned, EvidenceConfig(extractor_trained_on="none")).is_valid
    plain = embeddings_of(catalogue, {"train": 0.8, "validation": 0.8})
    assert not picked(catalogue, plain, EvidenceConfig(extractor_trained_on="train")).is_valid


def test_rows_of_a_calibration_split_take_the_place_of_known_train_labels() -> None:
    catalogue = catalogue_of({"train": [3] * N_LABELS, "calibration": [4] * 10, "validation": [6] * N_LABELS})
    spread = {"train": 0.2, "calibration": 1.2, "validation": 1.2}
    for config in (EvidenceConfig(), EvidenceConfig(calibration_split="calibration")):
        used = picked(catalogue, embeddings_of(catalogue, spread), config)
        assert used.is_valid
        assert set(used.images.table["split"]) == {"calibration"}
    with pytest.raises(BadInput, match="validation"):
        EvidenceConfig(calibration_split="validation")


def test_a_calibration_split_is_used_although_no_train_label_is_found_to_be_known() -> None:
    catalogue = catalogue_of({"train": [3] * N_LABELS, "calibration": [4] * 10, "validation": [6] * N_LABELS})
    embeddings = embeddings_of(catalogue, {"train": 1.2, "calibration": 1.2, "validation": 1.2})
    used = picked(catalogue, embeddings)
    assert used.is_valid
    assert set(used.images.table["split"]) == {"calibration"}
    assert used.seen is not None
    assert used.seen.ids.tolist() == catalogue.restrict("train").ids.tolist()
    assert used.note["seen"] == 0
    said = picked(catalogue, embeddings, EvidenceConfig(extractor_trained_on="none"))
    assert (set(said.images.table["split"]), said.seen) == ({"train"}, None)
    few = catalogue_of({"train": [3] * N_LABELS, "calibration": [4] * 3, "validation": [6] * N_LABELS})
    used = picked(few, embeddings_of(few, {"train": 1.2, "calibration": 1.2, "validation": 1.2}))
    assert (set(used.images.table["split"]), used.seen) == ({"train"}, None)


def test_seen_labels_that_are_chosen_on_too_stand_beside_nothing() -> None:
    catalogue = catalogue_of({"train": [3] * N_LABELS, "calibration": [4] * 10, "validation": [6] * N_LABELS})
    shared = catalogue.table["label"][catalogue.table["split"] == "calibration"].iloc[0]
    first = catalogue.table["label"][catalogue.table["split"] == "train"].iloc[0]
    table = catalogue.table.assign(label=catalogue.table["label"].replace(first, shared))
    catalogue = Catalogue(table, "shared.csv")
    used = picked(catalogue, embeddings_of(catalogue, {"train": 1.2, "calibration": 1.2, "validation": 1.2}))
    assert used.seen is not None
    assert set(used.seen.table["label"]) == set(table["label"][table["split"] == "train"]) - {shared}


def test_a_weights_file_tells_the_labels_that_it_was_trained_on(tmp_path: Path) -> None:
    catalogue = catalogue_of({"train": [3] * 10, "validation": [3] * 10})
    extractor = build_extractor(BACKBONE)
    path = save_extractor(extractor, tmp_path / "w.safetensors", {label_digest(str(n)) for n in range(6)})
    assert seen_labels(path) == {label_digest(str(n)) for n in range(6)}
    assert seen_labels(save_extractor(extractor, tmp_path / "fresh.safetensors")) == frozenset()
    used = pick_labels(catalogue, str(path), EvidenceConfig(), lambda images: pytest.fail("nothing to look for"))
    assert used.is_valid
    assert sorted(set(used.images.table["label"])) == ["6", "7", "8", "9"]
    assert "6 of 10" in used.note["text"]
    own = extractor.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in read_state_dict(path).items())
    catalogue.table.loc[catalogue.table["label"] == "3", "split"] = "calibration"
    with pytest.raises(BadInput, match="calibration"):
        pick_labels(catalogue, str(path), EvidenceConfig(calibration_split="calibration"), lambda images: None)  # pyright: ignore


@pytest.mark.parametrize(("sizes", "is_valid"), [([4, 4], False), ([4, 4, 4, 1], False), ([4] * 4, True)])
def test_two_labels_are_enough_to_train_and_four_to_choose(sizes: list[int], is_valid: bool) -> None:
    catalogue = catalogue_of({"train": sizes, "validation": [6] * 10})
    used = picked(catalogue, embeddings_of(catalogue, {"train": 2.0, "validation": 2.0}))
    assert used.is_valid is is_valid
    assert len(used.images) == sum(sizes)
    assert is_valid or "too few to choose" in used.note["text"]
    with pytest.raises(BadInput, match="at least 2"):
        picked(catalogue_of({"train": [4, 1, 1]}), embeddings_of(catalogue, {"train": 1.0, "validation": 1.0}))
