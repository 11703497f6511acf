"""What re-ranking costs for each top_n: counts that follow from the lists, and seconds of the one pass. Layer 3.

All values of top_n are measured from one scoring pass. Their pairs and images are counted; their seconds follow from
what an image and a pair took in that pass, so that a continued run, which scored the rest only, tells the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distributed_rerank.data import artifacts
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.reranking.run import Scored


def total_cost(scored: Scored, model: PairwiseModel | None) -> dict[str, Any]:
    """Counts of the whole scoring pass; what a run really did is in the manifests."""
    if model is None or scored.logits is None:
        return {"pairs": 0, "unique_images": 0}
    gflop = round(model.gflop_per_pair(), 6)
    return {
        "pairs": scored.n_pairs,
        "unique_images": scored.n_images,
        "gflop_per_pair": gflop,
        "gflop": round(gflop * scored.n_pairs, 3),
        "bytes_per_image": model.bytes_per_image,
    }


def cost_of_each(scored: Scored, cost: Mapping[str, Any], top_ns: list[int], n_items: int) -> list[dict[str, Any]]:
    """Pairs, images, GFLOP and bytes of encodings for each of the ascending `top_ns`; images without a pair cost none.

    [] where nothing was scored. One pass over the lists, a slice of columns at a time.
    """
    if scored.logits is None:
        return []
    is_used = np.zeros(n_items, bool)
    pairs, start, found = 0, 0, []
    for top_n in top_ns:
        is_pair = np.isfinite(scored.logits[:, start:top_n])
        pairs += int(is_pair.sum())
        is_used[scored.lists.items[:, start : start + is_pair.shape[1]][is_pair]] = True
        is_used[scored.lists.query_items[is_pair.any(axis=1)]] = True
        images = int(is_used.sum())
        found.append(
            {
                "pairs": pairs,
                "images": images,
                "gflop": round(cost["gflop_per_pair"] * pairs, 6),
                "bytes": cost["bytes_per_image"] * images,
            }
        )
        start = top_n
    return found


def read_pace(folder: Path) -> dict[str, float] | None:
    """Seconds for an image and for a pair, and the workers, of the run that finished the scoring stage `folder`.

    None where that run scored nothing itself, or another version of this code wrote the folder.
    """
    if not (folder / artifacts.MANIFEST).is_file():
        return None
    manifest = artifacts.read_manifest(folder)
    counts, seconds = manifest.get("counts") or {}, manifest.get("seconds") or {}
    if not seconds or not counts.get("pairs_scored") or not counts.get("images_decoded"):
        return None
    return {
        "seconds_per_image": seconds["encode"] / counts["images_decoded"],
        "seconds_per_pair": seconds["score"] / counts["pairs_scored"],
        "n_workers": seconds["n_workers"],
    }


def seconds_of_each(
    curve: list[dict[str, Any]], pace: Mapping[str, float] | None, n_queries: int, price_per_worker_hour: float | None
) -> list[dict[str, Any]]:
    """Seconds of the pass for each point of the curve, by query and by worker, and the price of 1,000 queries."""
    if pace is None:
        return []
    found = []
    for point in curve:
        seconds = point["images"] * pace["seconds_per_image"] + point["pairs"] * pace["seconds_per_pair"]
        worker_seconds = seconds * pace["n_workers"]
        timed: dict[str, Any] = {
            "top_n": point["top_n"],
            "seconds": round(seconds, 4),
            "seconds_per_query": seconds / n_queries,
            "worker_seconds": round(worker_seconds, 4),
        }
        if price_per_worker_hour is not None:
            timed["price_per_1000_queries"] = worker_seconds / 3600 * price_per_worker_hour / n_queries * 1000
        found.append(timed)
    return found
