"""What each step of the chain adds to the one before, beside what it costs."""

from collections.abc import Iterator, Mapping
from typing import Any

from distributed_rerank.chain.chain import kind_of
from distributed_rerank.evaluation.measure import Evaluation, LabelledQueries, Wanted, measure_ranking
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.tensors import metrics, statistics
from distributed_rerank.tensors.metrics import PerQuery


def measure_steps(
    ranked: Ranked, queries: LabelledQueries, measured: Evaluation, cost: Mapping[str, Any], *, seed: int
) -> list[dict[str, Any]]:
    """One entry for each step of the chain, in order: `step`, its means, and its difference to the step before.

    `pairs` are all that were scored, `bytes_per_image` what the step keeps of an image; both are 0 for a step that
    scores none. Steps on neighbours are one entry. [] where the chain has no steps.
    """
    entries, before = [], measured.before
    for name, after in values_by_step(ranked, queries, measured):
        after = {key: after[key] for key in before}
        entries.append(
            {
                "step": name,
                "metrics": metrics.means(after),
                "difference": statistics.compare_to_json(before, after, queries.labels, seed=seed, n_resamples=2000),
                "pairs": cost["pairs"] if name == "pairwise" else 0,
                "bytes_per_image": cost["bytes_per_image"] if name == "pairwise" else 0,
            }
        )
        before = after
    return entries


def values_by_step(ranked: Ranked, queries: LabelledQueries, measured: Evaluation) -> Iterator[tuple[str, PerQuery]]:
    """Name of each chain step and the compared metrics of the queries after it."""
    chain, is_scored = ranked.chain, ranked.pairwise is not None
    if chain.adapt is not None:
        yield "adapt", measure_ranking(queries, ranked.searched, Wanted((1, 10))).compared
    if is_scored and chain.neighbourhood:
        assert ranked.pairwise is not None, "pairs were scored"
        yield "pairwise", measure_ranking(queries, ranked.pairwise, Wanted((1, 10))).compared
    last = " and ".join(map(kind_of, chain.neighbourhood)) or ("pairwise" if is_scored else "")
    if last and measured.after is not None:
        yield last, measured.after
