"""What would settle the question: more queries, or labels that are looked at again.

Labels to check are ranked by the estimated precision of the list down to each (`tensors.suspects`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distributed_rerank.chain.probability import probabilities
from distributed_rerank.config.evaluation import MeasureConfig
from distributed_rerank.data.texts import as_series
from distributed_rerank.evaluation.measure import (
    COMPARED,
    Evaluation,
    LabelledQueries,
    Wanted,
    count_relevant,
    measure_ranking,
    of_all_blocks,
)
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.suspects import PROBABLE, evidence_of_labels, precision_of_suspects

N_LABELS_TO_CHECK = 40
DEPTH = 10
"""Neighbours that a label is judged by."""


def labels_to_check(ranked: Ranked, labelled: LabelledQueries) -> list[dict[str, Any]]:
    """At most `N_LABELS_TO_CHECK` queries whose label may be wrong, the most probable first; ties by distance, item.

    Each with the nearest candidate of the label that its neighbours agree on, in the final ranking, and `precision`,
    the estimated share of wrong labels down to this one. An image is in one pair at most. Queries whose label no other
    image has are not judged; with judgements in place of labels no query is. Training's suspects.parquet is another
    list: pairs of the train split under a distance threshold.
    """
    if labelled.judged is not None:
        return []
    catalogue, names = ranked.catalogue, ranked.catalogue.label_names
    labels = tensor_of(catalogue.labels)
    found = of_all_blocks(labelled, partial(_neighbours_of_another_label, ranked, labels))
    candidates, distances, places = (found[name] for name in ("candidate", "distance", "place"))
    precision = precision_of_suspects(found["own"], found["other"])
    pairs: list[dict[str, Any]] = []
    taken: set[int] = set()
    queries = labelled.query_items.tolist()
    for row in np.lexsort((queries, distances.numpy(), -precision.numpy())).tolist():
        query, candidate = queries[row], int(candidates[row])
        if len(pairs) == N_LABELS_TO_CHECK:
            break
        if candidate < 0 or query in taken or candidate in taken:
            continue
        taken |= {query, candidate}
        pairs.append(
            {
                "query_id": str(catalogue.ids[query]),
                "query_label": str(names[int(labels[query])]),
                "gallery_id": str(catalogue.ids[candidate]),
                "gallery_label": str(names[int(labels[candidate])]),
                "distance": float(distances[row]),
                "rank": int(places[row]) + 1,
                "precision": float(precision[row]),
            }
        )
    return pairs


def _neighbours_of_another_label(ranked: Ranked, labels: Tensor, block: LabelledQueries) -> dict[str, Tensor]:
    """Of each query: evidence of its label, `own`, and of the strongest `other`, and the nearest candidate of that.

    `candidate` (-1 = none), its `distance` and its `place`; all `[query]`.
    """
    lists = ranked.final[block.rows].first(DEPTH)
    found = probabilities(ranked.chain, lists.distances) if ranked.after else None
    weights = torch.ones_like(lists.distances) if found is None else found
    known = torch.where(lists.items >= 0, labels[lists.items], -1).long()
    own, other, label = evidence_of_labels(weights, known, labels[block.query_items].long())
    is_that = (known == label[:, None]) & (known >= 0)
    place = is_that.to(torch.uint8).argmax(dim=1) if is_that.shape[1] else torch.zeros_like(label)
    has_one = is_that.any(dim=1)
    candidate, distance = torch.full_like(label, -1), torch.full(label.shape, torch.inf)
    candidate[has_one] = lists.items[has_one].gather(1, place[has_one, None])[:, 0]
    distance[has_one] = lists.distances[has_one].gather(1, place[has_one, None])[:, 0].float()
    return {"own": own, "other": other, "candidate": candidate, "distance": distance, "place": place}


def ship_or_wait(
    ranked: Ranked,
    queries: LabelledQueries,
    measured: Evaluation,
    suspects: Sequence[dict[str, Any]],
    config: MeasureConfig,
) -> dict[str, Any]:
    """For metrics.json: how many more queries would show the gain, and the figures if probable suspects are wrong.

    `more_queries` has the metrics whose interval holds 0 (null: no number of queries would do). `if_suspects_are_wrong`
    has the number of suspects of precision `PROBABLE` or more and the final figures with their labels changed to those
    of the candidates; absent where there is none.
    """
    found: dict[str, Any] = {"more_queries": {}}
    if measured.after is not None:
        for key, after in measured.after.items():
            low, high = measured.metrics["difference"][key]["ci95"]
            if low <= 0 <= high:
                change = after - measured.before[key]
                found["more_queries"][key] = statistics.queries_needed(change, queries.labels)
    probable = [pair for pair in suspects if pair["precision"] >= PROBABLE]
    if probable:
        found["if_suspects_are_wrong"] = {"n_labels": len(probable)} | _with_other_labels(ranked, probable, config)
    return found


def _with_other_labels(ranked: Ranked, pairs: Sequence[dict[str, Any]], config: MeasureConfig) -> dict[str, Any]:
    """Figures of the final ranking where each pair's query has the label of its candidate."""
    catalogue = ranked.catalogue
    queries, candidates = (catalogue.items_of([pair[side] for pair in pairs]) for side in ("query_id", "gallery_id"))
    labels = catalogue.labels.copy()
    labels[queries] = labels[candidates]
    texts = pa.DictionaryArray.from_arrays(pa.array(labels, mask=labels < 0), catalogue.label_names.column)
    relabelled = replace(catalogue, table=catalogue.table.assign(label=as_series(texts)))
    labelled = count_relevant(relabelled, ranked.query_items)
    values = measure_ranking(labelled, ranked.final, Wanted(config.ks)).values
    keys = [key for key in COMPARED if key in values]
    intervals = statistics.bootstrap(
        torch.stack([values[key] for key in keys], dim=1), labelled.labels, seed=config.resampling_seed
    )
    return {
        key: {"mean": interval.mean, "ci95": [interval.low, interval.high]}
        for key, interval in zip(keys, intervals, strict=True)
    }
