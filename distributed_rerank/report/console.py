"""The outcome of an evaluation as plain text for a terminal or a log."""

from collections.abc import Mapping
from typing import Any

from distributed_rerank.report.formatting import (
    fraction,
    in_table_order,
    interval,
    metric_name,
    same_bytes_in_words,
    signed,
)
from distributed_rerank.report.verdict import verdict


def table_in_text(metrics: Mapping[str, Any]) -> str:
    """The verdict, then a line for each metric: before, after, the difference and its 95 % interval."""
    is_reranked = bool(metrics.get("reranked"))
    outcome = verdict(metrics)
    counts = f"{metrics['n_queries']} queries, {metrics['n_gallery']} gallery items"
    if metrics["n_without_relevant"] or metrics.get("n_rejected"):
        counts += f", {metrics['n_without_relevant']} queries without a relevant item left out"
        counts += f", {metrics.get('n_rejected', 0)} images rejected"
    if metrics.get("n_without_list"):
        counts += f", {metrics['n_without_list']} queries without a list"
    counts += "".join(f", {n} {words}" for n, words in same_bytes_in_words(metrics))
    words = (outcome.plain, outcome.sentence, outcome.detail, f"Next: {outcome.next_step}")
    lines = [*filter(None, words), f"{counts}; chain: {metrics.get('chain', 'first stage')}", ""]
    head = f"{'':14}{'before':>9}"
    lines.append(head + (f"{'after':>9}{'change':>10}   95 % interval" if is_reranked else ""))
    for key in in_table_order(metrics["first_stage"]):
        before = metrics["first_stage"][key]
        line = f"{metric_name(key):14}{fraction(before):>9}"
        if is_reranked:
            after, compared = metrics["reranked"][key], metrics["difference"][key]
            line += f"{fraction(after):>9}{signed(after - before):>10}   {interval(compared)}"
        lines.append(line)
    return "\n".join(lines)
