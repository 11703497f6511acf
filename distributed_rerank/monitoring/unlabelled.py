"""The expected quality of re-ranked queries without labels, from an evaluation of labelled ones; and a drift alarm."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from distributed_rerank.data import tables
from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.comparison import fingerprint_of
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import write_json
from distributed_rerank.storage.manifests import check_paths
from distributed_rerank.tensors.expected import LabelledSample, drift, expected_values, signals_of
from distributed_rerank.tensors.statistics import Interval

logger = logging.getLogger(__name__)

FALSE_ALARMS = 0.01
"""Share of the nights in which queries that are asked as ever raise the alarm."""
DEPTH = 10
"""Candidates of a list that its signals look at."""
FILE = "expected.json"


def expect(evaluation: Path, reranked: Path, *, seed: int = 0) -> dict[str, Any]:
    """What the queries of the folder `reranked` are expected to reach, by those of `evaluation`; have they drifted?

    Written to expected.json in `reranked` and returned: `expected` with mean and 95 % interval of each metric, `drift`
    with its p-value. A labelled query without a relevant gallery item counts as wrong, as an unlabelled one may be.
    Raises BadInput for folders of other kinds, and as `expected_values`.
    """
    sample, names = labelled_sample(evaluation)
    queries = signals_of(torch.from_numpy(_distances(reranked)[1]))
    found = dict(zip(names, expected_values(sample, queries), strict=True))
    p_value = drift(sample, queries, seed=seed)
    content = {
        "evaluation": str(evaluation),
        "n_labelled_queries": len(sample.values),
        "n_labels": len(sample.clusters.unique()),
        "n_queries": len(queries),
        "expected": {name: _to_json(interval) for name, interval in found.items()},
        "drift": {"p_value": p_value, "alarm": p_value < FALSE_ALARMS, "false_alarms": FALSE_ALARMS},
    }
    write_json(reranked / FILE, content)
    return content


def check_source(evaluation: Path, model: Any, chain: Any) -> None:
    """Raises BadInput unless the folder is an evaluation with re-ranked lists, of this model and chain (identities)."""
    fingerprint = fingerprint_of(evaluation)
    if not (evaluation / "reranked.parquet").is_file():
        raise BadInput(f"--expect-from {evaluation} has no reranked.parquet; give an evaluation with --model")
    for name, identity in (("model", model), ("chain", chain)):
        if artifacts.json_digest(fingerprint.get(name)) != artifacts.json_digest(identity):
            raise BadInput(f"--expect-from {evaluation} was evaluated with another {name}; evaluate this one")


def in_words(content: Mapping[str, Any]) -> str:
    """The expectation in a sentence, and what the drift test says."""
    first = content["expected"]["cmc@1"]
    low, high = (f"{100 * end:.0f}" for end in first["ci95"])
    text = f"expected: the right one first for {100 * first['mean']:.0f} of 100 queries [{low}, {high}]"
    for name, value in content["expected"].items():
        if name != "cmc@1":
            low, high = (f"{end:.3f}" for end in value["ci95"])
            text += f", {name} {value['mean']:.3f} [{low}, {high}]"
    known = f"the {content['n_labelled_queries']:,} labelled queries of {content['evaluation']}"
    p_value = f"p {content['drift']['p_value']:.2g}"
    if content["drift"]["alarm"]:
        return (
            f"{text}; DRIFT: these queries are not like {known} ({p_value}); label some of them before you trust this"
        )
    return f"{text}; drift: none seen, they look like {known} ({p_value})"


def labelled_sample(evaluation: Path) -> tuple[LabelledSample, list[str]]:
    """The sample of an evaluation, and the names of its metrics: CMC@1, and precision at its largest cut-off."""
    ids, distances = _distances(evaluation)
    table = tables.read_table(evaluation, "per_query").to_pandas().set_index("query_id")
    cutoffs = [
        name.removeprefix("precision@").removesuffix("_after") for name in table if name.startswith("precision@")
    ]
    deepest = max((int(cutoff) for cutoff in cutoffs if cutoff.isdigit()), default=1)
    names = ["cmc@1"] if deepest == 1 else ["cmc@1", f"precision@{deepest}"]
    first = (table["first_hit_after"] == 1).fillna(False).astype(np.float64).rename("cmc@1")
    values = pd.concat([first, *(table[f"{name}_after"].rename(name) for name in names[1:])], axis=1)
    # A query without a relevant item has no row there: a label of its own, and 0 in every metric.
    values = values.reindex(ids).fillna(0.0).to_numpy(np.float64)
    labels = table["label"].astype(str).reindex(ids)
    of_label, of_query = labels.notna().to_numpy(), np.arange(len(ids))
    clusters = of_query.copy()
    clusters[of_label] = len(ids) + np.unique(labels[of_label].astype(str), return_inverse=True)[1]
    return LabelledSample(
        signals_of(torch.from_numpy(distances)), torch.from_numpy(values), torch.from_numpy(clusters)
    ), names


def _distances(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the queries, ascending, and the chain's distances of the first `DEPTH` candidates; inf = fewer."""
    path = folder / "reranked.parquet"
    check_paths([path])
    table = pq.read_table(path, columns=["query_id", "rank", "distance"], filters=[("rank", "<=", DEPTH)])
    ids, rows = np.unique(table["query_id"].to_numpy(), return_inverse=True)
    distances = np.full((len(ids), DEPTH), np.inf, np.float32)
    distances[rows, table["rank"].to_numpy() - 1] = table["distance"].to_numpy()
    return ids, distances


def _to_json(interval: Interval) -> dict[str, Any]:
    """Four decimals: the last bits of a matrix product depend on the machine."""
    return {"mean": round(interval.mean, 4), "ci95": [round(interval.low, 4), round(interval.high, 4)]}
