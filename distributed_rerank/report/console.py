"""The outcome of an evaluation as plain text for a terminal or a log. Layer 3."""

from collections.abc import Mapping
from typing import Any

from distributed_rerank.report.formatting import fraction, metric_name, signed, verdict


def table_in_text(metrics: Mapping[str, Any]) -> str:
    """Metrics before and after with the difference and its 95 % interval, one line each, and the verdict above them."""
    is_reranked = bool(metrics.get("reranked"))
    told = verdict(metrics, is_reranked)
    counts = f"{metrics['n_queries']} queries, {metrics['n_gallery']} gallery items"
    if metrics["n_without_relevant"] or metrics.get("n_rejected"):
        counts += f", {metrics['n_without_relevant']} queries without a relevant item left out"
        counts += f", {metrics.get('n_rejected', 0)} images rejected"
    lines = [told.sentence, told.detail, f"{counts}; chain: {metrics.get('chain', 'first stage')}", ""]
    head = f"{'':14}{'before':>9}"
    lines.append(head + (f"{'after':>9}{'change':>10}   95 % interval" if is_reranked else ""))
    for key, before in metrics["first_stage"].items():
        line = f"{metric_name(key):14}{fraction(before):>9}"
        if is_reranked:
            low, high = metrics["difference"][key]["ci95"]
            change = metrics["reranked"][key] - before
            line += f"{fraction(metrics['reranked'][key]):>9}{signed(change):>10}   {signed(low)} to {signed(high)}"
        lines.append(line)
    return "\n".join(line for line in lines if line is not None)
