"""Which labels may show what re-ranking is worth: those that the extractor has not seen.

An extractor ranks the labels that it was trained on far better than new ones. What a re-ranker gains or loses on them
says nothing about new labels. So mining, training and the choice of the chain use other labels, where there are any.
That the extractor knows the train labels is said by its weights file, by the user, or it is found in the embeddings:
images of train labels then form closed groups, and the images of another split do not. Labels of other splits are
never used for that.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distributed_rerank.config.training import EvidenceConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.models import weights
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors import metrics, statistics
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.label_split import usable_labels
from distributed_rerank.tensors.neighbour_agreement import neighbour_agreement
from distributed_rerank.training.sides import LABELS_TO_CHOOSE_ON

logger = logging.getLogger(__name__)

CALIBRATION = "calibration"
MIN_LABELS = 2
SUSPICIOUS_MAP = 0.65
"""mAP@10 of train lists below which an extractor is not taken to know the train labels."""
AGREEMENT_GAP = 0.12
LOW_AGREEMENT_GAP = 0.08
"""Neighbour agreement of train images above that of others, and the low end of its interval, from which the train
labels count as known (benchmarks/seen_labels.py)."""
SAMPLE = 500
"""Images of either side that are looked at."""
SIZES = (1, 2, 3, 4, 5, 7, 9, 11, 14, 19, 24, 29, 39)
"""Of groups that images of unknown labels are asked for: labels of 2 to 40 images."""
LARGEST_SIZE = 40
FIX = (
    "give labels that the extractor has not seen (rows of split `calibration`, or --calibration-split), or say "
    "--extractor-trained-on none if it has seen none"
)


@dataclass(frozen=True)
class LabelsToUse:
    """The images to mine, train and choose on, and whether what they show holds for new labels."""

    images: Catalogue
    is_valid: bool
    note: dict[str, Any]
    """For chain.json: `seen` (how many train labels the extractor has seen), `source`, `text`."""
    seen_before: frozenset[str] = frozenset()
    """Digests of the labels that the extractor's weights file names."""
    seen: Catalogue | None = None
    """Train images of labels that the extractor has seen, or may have, where other labels are chosen on."""


def check_enough_labels(catalogue: Catalogue, config: EvidenceConfig) -> None:
    """Raises BadInput for fewer than `MIN_LABELS` train labels of two images or more."""
    n_labels = MIN_LABELS if config.calibration_split else n_usable_labels(catalogue.restrict("train"))
    if n_labels < MIN_LABELS:
        raise BadInput(
            f"{catalogue.source}: {n_labels} train labels have two images or more, training needs at least "
            f"{MIN_LABELS}; add images"
        )


def pick_labels(
    catalogue: Catalogue,
    extractor_weights: str | None,
    config: EvidenceConfig,
    embed: Callable[[Catalogue], Embeddings],
) -> LabelsToUse:
    """The images of split train whose labels the extractor has not seen, or those of a calibration split.

    `embed` gives embeddings of any part of the catalogue. Raises BadInput for a calibration split with labels that the
    extractor was trained on.
    """
    check_enough_labels(catalogue, config)
    train, seen_before = catalogue.restrict("train"), weights.seen_labels(extractor_weights)
    is_seen, source = seen_among(train, extractor_weights, config)
    if source == "" and config.calibration_split is None:
        source = found_in_embeddings(catalogue, train, embed)
        is_seen = np.full(len(train), bool(source))
    n_labels, n_seen = (len(np.unique(part[part >= 0])) for part in (train.labels, train.labels[is_seen]))
    name = config.calibration_split or split_of_unseen(catalogue, config, n_seen)
    if name is not None:
        images, text = catalogue.restrict(name), f"labels of split {name} are trained and chosen on"
        if seen_among(images, extractor_weights, EvidenceConfig())[0].any():
            raise BadInput(f"the extractor was trained on labels of split {name}; name a split that it has not seen")
        is_seen[:] = True  # or may be: the split is there because its labels are those that nobody has trained on
    elif n_seen == 0:
        return unseen(train, source, seen_before)
    else:
        images = train.take(np.flatnonzero(~is_seen))
        text = "the other train labels are trained and chosen on"
    seen = f"the extractor has seen {n_seen} of {n_labels} train labels ({source})"
    is_valid = n_usable_labels(images) >= LABELS_TO_CHOOSE_ON
    if not is_valid:
        images, text = train, f"so no label shows what re-ranking is worth, and the chain is the first stage: {FIX}"
    text = f"{seen}; {text}" if n_seen else text
    logger.log(logging.INFO if is_valid else logging.WARNING, "%s", text)
    note = {"seen": n_seen, "source": source, "text": text}
    is_other = ~np.isin(np.asarray(train.label_names)[train.labels], np.asarray(images.label_names))
    seen_images = train.take(np.flatnonzero(is_seen & is_other)) if is_valid else None
    return LabelsToUse(images, is_valid, note, seen_before, seen_images)


def split_of_unseen(catalogue: Catalogue, config: EvidenceConfig, n_seen: int) -> str | None:
    """`CALIBRATION` where the table has such rows to use; None where the extractor is said to know no label.

    That no train label is found to be known does not matter: a weakly tuned extractor is not found out, and harms.
    """
    labels = catalogue.labels[(catalogue.table["split"] == CALIBRATION).to_numpy(bool)]
    n_usable = int((np.unique(labels[labels >= 0], return_counts=True)[1] > 1).sum())
    if config.extractor_trained_on == "none" or not n_usable:
        return None
    return CALIBRATION if n_seen or n_usable >= LABELS_TO_CHOOSE_ON else None


def unseen(train: Catalogue, source: str, seen_before: frozenset[str]) -> LabelsToUse:
    """All train images, of which the extractor has seen none; too few labels are trained on without a choice."""
    n_usable, text = n_usable_labels(train), ""
    if n_usable < LABELS_TO_CHOOSE_ON:
        text = (
            f"{n_usable} train labels with two images or more are too few to choose a chain on: the model is trained "
            f"with fixed constants, and the chain is the first stage; from {LABELS_TO_CHOOSE_ON} labels on it is chosen"
        )
        logger.warning("%s", text)
    return LabelsToUse(train, not text, {"seen": 0, "source": source, "text": text}, seen_before)


def n_usable_labels(images: Catalogue) -> int:
    """Labels with two images or more."""
    return len(usable_labels(images.labels.astype(np.int64)))


def seen_among(images: Catalogue, extractor_weights: str | None, config: EvidenceConfig) -> tuple[np.ndarray, str]:
    """Which images have a label that the extractor was trained on, and who says so; "" = nobody says anything."""
    if config.extractor_trained_on != "unknown":
        is_seen = np.full(len(images), config.extractor_trained_on == "train")
        return is_seen, f"--extractor-trained-on {config.extractor_trained_on}"
    digests = weights.seen_labels(extractor_weights)
    seen = [number for number, name in enumerate(images.label_names) if weights.label_digest(str(name)) in digests]
    return np.isin(images.labels, seen), "its weights file says so" if seen else ""


def found_in_embeddings(catalogue: Catalogue, train: Catalogue, embed: Callable[[Catalogue], Embeddings]) -> str:
    """The finding where embeddings of train images look as if the extractor knew their labels; "" otherwise.

    Images of other splits are embedded only where the train lists are good enough to ask.
    """
    n_train = len(train)
    of_train = embed(train)
    train = train.take(np.flatnonzero(of_train.rows_of(train.ids) >= 0))
    x = tensor_of(of_train.matrix[of_train.rows_of(train.ids)])
    labels = tensor_of(train.labels).long()
    rows = sample_of(np.flatnonzero(train.labels >= 0))
    found = mean_average_precision(x, labels, tensor_of(train.sequences).long(), rows)
    if found < SUSPICIOUS_MAP:
        return ""
    others = catalogue.take(np.flatnonzero(catalogue.table["split"].to_numpy() == "validation"))
    if len(others) < 2:
        logger.warning(
            "mAP@10 of the train lists is %.3f; the table has no split validation to compare with, so it stays open "
            "whether the extractor has seen the train labels: if it has, say --extractor-trained-on train", found,
        )  # fmt: skip
        return ""
    both = embed(catalogue.take(np.flatnonzero(catalogue.table["split"].isin(["train", "validation"]))))
    others = others.take(np.flatnonzero(both.rows_of(others.ids) >= 0))
    x = torch.cat([x, tensor_of(both.matrix[both.rows_of(others.ids)])])
    own, other, low = agreement_of_both(x, labels, len(train))
    logger.info(
        "train lists have mAP@10 %.3f; neighbours of train images agree %.3f, of validation images %.3f (%d and %d)",
        found, own, other, n_train, len(others),
    )  # fmt: skip
    if own - other < AGREEMENT_GAP or low - other < LOW_AGREEMENT_GAP:
        return ""
    return (
        f"mAP@10 of its train lists is {found:.3f}, and neighbours of train images agree {own:.2f}, those of "
        f"validation images {other:.2f}"
    )


def sample_of(items: np.ndarray) -> torch.Tensor:
    """At most `SAMPLE` of these items, drawn by a fixed seed, ascending."""
    return tensor_of(np.sort(np.random.default_rng(0x5EE).permutation(items)[:SAMPLE]))


def mean_average_precision(
    x: torch.Tensor, labels: torch.Tensor, sequences: torch.Tensor, queries: torch.Tensor
) -> float:
    """mAP@10 of these items' lists among all; 0 where none has a relevant item."""
    everyone = torch.arange(len(x))
    n_relevant = metrics.count_relevant(queries, labels[queries], sequences[queries], everyone, labels, sequences)
    queries, n_relevant = queries[n_relevant > 0], n_relevant[n_relevant > 0]
    if not len(queries):
        return 0.0
    lists = nearest(
        x[queries], x, query_items=queries, gallery_items=everyone, n_items=10, query_sequences=sequences[queries],
        gallery_sequences=sequences,
    )  # fmt: skip
    is_relevant = metrics.relevance(lists.items, labels[queries], labels)
    return float(metrics.per_query(is_relevant, n_relevant, (10,))["map@10"].mean())


def agreement_of_both(x: torch.Tensor, labels: torch.Tensor, n_train: int) -> tuple[float, float, float]:
    """Neighbour agreement of train images (the first `n_train` of `x`) and of the others, and the first one's low end.

    Train images are asked for groups as large as their label, others for groups of such sizes and of `SIZES`: the best
    of their means counts, for their labels are not known. The low end is that of the interval by label.
    """
    _, number, counts = labels.unique(return_inverse=True, return_counts=True)
    size = (counts[number] - 1).clamp(max=LARGEST_SIZE) * (labels >= 0)
    rows = sample_of((size > 0).nonzero().squeeze(1).numpy())
    others = sample_of(np.arange(n_train, len(x)))
    own = neighbour_agreement(x, rows, size[rows, None])
    drawn = size[rows][torch.arange(len(others)) % len(rows)]
    sizes = torch.cat([drawn[:, None], torch.tensor(SIZES).expand(len(others), -1)], dim=1)
    other = float(neighbour_agreement(x, others, sizes).mean(dim=0).max())
    interval = statistics.bootstrap(own, labels[rows], seed=0)[0]
    return interval.mean, other, interval.low
