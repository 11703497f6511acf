"""The report on mining, made before anything is trained: a table of figures, and pairs of images worth a look.

mining.json in the model folder has the figures, suspects.parquet the suspect pairs: images of different labels that are
nearer to each other than most images are to the nearest one of their own label. Such a pair is one picture under two
labels, or a wrong label, or two products that the first stage cannot tell apart; a person who sees both images knows.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.executors import Executors
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.storage.files import write_json
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.candidate_mining import are_positive, filter_negatives, suspected_mislabels
from distributed_rerank.tensors.look_alikes import look_alike_groups
from distributed_rerank.tensors.mining_statistics import mining_statistics
from distributed_rerank.tensors.suspects import PROBABLE, evidence_of_labels, precision_of_suspects
from distributed_rerank.training.evidence import retrieve_among
from distributed_rerank.training.plan import labels_among
from distributed_rerank.training.task import TrainingTask

SUSPECT_NEIGHBOURS = 10
"""Suspect pairs and look-alikes are looked for among this many nearest images of each image, of any label."""
MAX_SUSPECTS = 1000
"""Most rows of the table, the most probable wrong labels first."""
DUPLICATE_SHARE = 0.1
"""Of the usual distance to the own label: images nearer than this are called the same picture."""


def nearest_images(
    images: Catalogue, embeddings: Embeddings, work: Path, executors: Executors | None
) -> CandidateLists:
    """The images nearest to each labelled one, among these alone; computed once in `work`."""
    everyone = np.flatnonzero(images.labels >= 0)
    return retrieve_among(everyone, images, embeddings, SUSPECT_NEIGHBOURS, work / "nearest", executors)


def look_alikes_of(
    images: Catalogue, embeddings: Embeddings, work: Path, executors: Executors | None
) -> Int64[np.ndarray, " label"]:
    """The group of look-alikes of each label."""
    lists = nearest_images(images, embeddings, work, executors)
    return look_alike_groups(lists, torch.from_numpy(images.labels.astype(np.int64))).numpy()


def mining_figures(task: TrainingTask) -> dict[str, Any]:
    """The figures of the lists that the last run, whose weights become the model's, is trained on."""
    run = task.runs[-1]
    labels = labels_among(run.anchors, task.labels)
    allowed, dropped = filter_negatives(
        run.anchors, labels, task.config.filters, task.embeddings, tensor_of(task.catalogue.sequences).long()
    )
    return asdict(mining_statistics(run.anchors, labels, allowed, dropped))


def find_suspect_pairs(lists: CandidateLists, catalogue: Catalogue) -> tuple[pa.Table, dict[str, Any]]:
    """The table `suspects`, its most probable wrong labels first, and its figures; `lists` have every image's nearest.

    A pair of different labels is suspect if its distance is at most the median distance of an image to the nearest one
    of its own label. What its kind is, is judged by the labels of either image's neighbours (`tensors.suspects`).
    """
    labels = tensor_of(catalogue.labels).long()
    is_own = are_positive(lists, labels)
    # [item]: the distance to the nearest image of the own label; inf where none is among the nearest.
    nearest_own = torch.full((len(labels),), torch.inf)
    if lists.items.shape[1]:
        nearest_own[lists.query_items] = torch.where(is_own, lists.distances, torch.inf).amin(dim=1)
    known = nearest_own[nearest_own.isfinite()]
    max_distance = float(known.median()) if len(known) else 0.0
    pairs, distances = suspected_mislabels(lists, labels, max_distance)
    is_duplicate = distances <= DUPLICATE_SHARE * max_distance
    # [pair]: one of the two labels of a duplicate is wrong; else as the more suspect image says.
    precision = torch.where(is_duplicate, 1.0, _precision_of_labels(lists, labels)[pairs].amax(dim=1))
    order = distances.argsort(stable=True)
    order = order[precision[order].argsort(descending=True, stable=True)]
    pairs, distances, is_duplicate, precision = (of[order] for of in (pairs, distances, is_duplicate, precision))
    figures = {
        "n_pairs": len(pairs),
        "n_duplicates": int(is_duplicate.sum()),
        "n_mislabels": int(((precision >= PROBABLE) & ~is_duplicate).sum()),
        "n_written": min(len(pairs), MAX_SUSPECTS),
        "max_distance": max_distance,
        "max_distance_of_duplicates": DUPLICATE_SHARE * max_distance,
    }
    rows = slice(0, MAX_SUSPECTS)
    table = suspects_table(pairs[rows], distances[rows], is_duplicate[rows], precision[rows], nearest_own, catalogue)
    return table, figures


def _precision_of_labels(lists: CandidateLists, labels: Tensor) -> Tensor:
    """Of each item: the estimated share of wrong labels among those at least as suspect.

    0 without a list, and for the only image of its label, which has no neighbour to agree with.
    """
    lists = lists[(torch.bincount(labels.clamp(min=0))[labels[lists.query_items]] > 1).nonzero()[:, 0]]
    known = torch.where(lists.items >= 0, labels[lists.items], -1)
    own, other, _ = evidence_of_labels(torch.ones(known.shape), known, labels[lists.query_items])
    found = torch.zeros(len(labels), dtype=torch.float64)
    if len(own):
        found[lists.query_items] = precision_of_suspects(own, other)
    return found


def suspects_table(
    pairs: Tensor, distances: Tensor, is_duplicate: Tensor, precision: Tensor, nearest_own: Tensor, catalogue: Catalogue
) -> pa.Table:
    """One row a pair; a distance to the own label is null where none of it is among the nearest."""
    columns: dict[str, pa.Array] = {}
    for prefix, items in zip(("", "other_"), pairs.T.numpy(), strict=True):
        own = nearest_own[torch.from_numpy(items)].numpy()
        columns[f"{prefix}id"] = pa.array(catalogue.ids[items], pa.string())
        columns[f"{prefix}label"] = catalogue.label_names.take(catalogue.labels[items])
        columns[f"{prefix}own_distance"] = pa.array(own, pa.float32(), mask=~np.isfinite(own))
    columns["distance"] = pa.array(distances.numpy(), pa.float32())
    kinds = np.where(precision.numpy() >= PROBABLE, "mislabel", "look-alike")
    columns["kind"] = pa.array(np.where(is_duplicate.numpy(), "duplicate", kinds).tolist(), pa.string())
    columns["precision"] = pa.array(precision.numpy(), pa.float32())
    return pa.table(columns)


def write_mining(task: TrainingTask, nearest: CandidateLists, folder: Path) -> dict[str, Any]:
    """Writes mining.json and suspects.parquet into `folder`; returns the content of mining.json.

    `nearest` are the lists of all train images among themselves.
    """
    suspects, figures = find_suspect_pairs(nearest, task.catalogue)
    content = {
        "run": task.runs[-1].name,
        "filters": asdict(task.config.filters),
        "lists": mining_figures(task),
        "suspects": figures,
    }
    write_json(folder / "mining.json", content)
    tables.write_table(folder / "suspects.parquet", suspects, "suspects")
    return content


def mining_in_text(content: dict[str, Any]) -> str:
    """mining.json as the table that is logged."""
    lists, suspects = content["lists"], content["suspects"]
    n_duplicates = suspects["n_duplicates"]
    lines = [
        f"mining: {lists['n_anchors']:,} anchors, {lists['n_candidates']:,} candidates",
        f"{'distances':26}{'n':>12}{'mean':>9}{'median':>9}{'smallest':>10}{'largest':>9}",
    ]
    for title, kind in (("positives in the lists", "positive"), ("negatives not filtered out", "negative")):
        values = lists[f"{kind}_distances"]
        cells = [
            "-" if values[key] is None else f"{values[key]:.3f}" for key in ("mean", "median", "smallest", "largest")
        ]
        lines.append(f"{title:26}{values['n']:>12,}{cells[0]:>9}{cells[1]:>9}{cells[2]:>10}{cells[3]:>9}")
    lines += [f"{'dropped by ' + name:26}{n:>12,}" for name, n in lists["dropped"].items() if n]
    lines += [
        f"{'anchors without positive':26}{lists['n_without_positive']:>12,}",
        f"{'anchors without negative':26}{lists['n_without_negative']:>12,}",
        f"{'hardest impostor used':26}{lists['share_of_hardest_used']:>12.1%}",
        f"suspected across labels: {n_duplicates:,} duplicates, {suspects['n_mislabels']:,} mislabels, "
        f"{suspects['n_pairs'] - n_duplicates - suspects['n_mislabels']:,} look-alikes (suspects.parquet)",
    ]
    return "\n".join(lines)
