"""An evaluation from catalogue to report: metrics.json, per_query.parquet, report.html and the stages before them.

metrics.json and per_query.parquet do not depend on time, workers or interruptions. Seconds go into timings.json, counts
of the work really done into the manifests of the stages.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distributed_rerank.approximate import approximate_searches
from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.promise import compare_with_promise
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig
from distributed_rerank.config.own import load_own
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.rejects import all_rejects
from distributed_rerank.data.relevance import check_measurable
from distributed_rerank.data.same_bytes import count_same_bytes
from distributed_rerank.evaluation import output as evaluation_output
from distributed_rerank.evaluation.baselines import Sources
from distributed_rerank.evaluation.diagnostics import diagnose
from distributed_rerank.evaluation.embedding_map import embedding_map
from distributed_rerank.evaluation.embedding_metrics import check_fmrs
from distributed_rerank.evaluation.measure import measure
from distributed_rerank.evaluation.output import Result
from distributed_rerank.evaluation.ranked import rank
from distributed_rerank.evaluation.things import thing_figures
from distributed_rerank.evaluation.why import explainer_of
from distributed_rerank.executors import Executors
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.reranking.first_stage import (
    check_depth,
    first_stage,
    first_stage_settings,
    input_digests,
    search_adapted,
)
from distributed_rerank.reranking.known_distances import known_distances
from distributed_rerank.reranking.pair_logits import score_first_stage
from distributed_rerank.runtime.progress import timed
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import file_digest, write_json

logger = logging.getLogger(__name__)


def evaluate(
    catalogue: Catalogue,
    config: FirstStageConfig,
    out: Path,
    *,
    model: PairwiseModel | None = None,
    chain: Chain | None = None,
    measure: MeasureConfig | None = None,
    work: WorkConfig | None = None,
    executors: Executors | None = None,
    overwrite: bool = False,
    train: Catalogue | None = None,
) -> dict[str, Any]:
    """Evaluate the queries of `catalogue`; returns what metrics.json holds.

    Images with the same bytes are counted, also against the rows that were trained on, `train`. Without `model` and
    chain the first stage alone is measured. A finished `out` of the same inputs is not computed again; a killed run
    continues with its unfinished blocks. Raises BadInput where the inputs do not
    fit together.
    """
    chain, measure = chain or Chain(), measure or MeasureConfig()
    work = work or WorkConfig()
    check_measurable(catalogue)
    if measure.fmrs:
        check_fmrs(catalogue, config.embeddings is not None or config.extractor.name is not None)
    check_depth(config, chain)
    fingerprint = _fingerprint(catalogue, config, measure, work, model, chain)
    if artifacts.recover(out, fingerprint, overwrite) or artifacts.is_complete(out, fingerprint, overwrite):
        logger.info("%s is complete: nothing to do", out)
        return json.loads((out / "metrics.json").read_text())
    timings: dict[str, float] = {}
    with artifacts.stage(out, fingerprint, overwrite) as staging:
        known = known_distances(model, chain)
        first = first_stage(catalogue, config, work, staging.path, executors, timings, known=known)
        with timed(timings, "adapt"):
            searched = search_adapted(first, chain, config, work, staging.path, executors)
        with timed(timings, "score"):
            scored = score_first_stage(searched, chain, model, config.n_items, work, staging.path, executors)
        with timed(timings, "rank"):
            ranked = rank(searched, scored, chain, model is not None, first.lists)
        with timed(timings, "measure"):
            sources = Sources(
                ranked, config.n_items, work, model, staging.path, executors, measure.external, measure.unscored
            )
            result, details = _measure(sources, measure)
        rejects = all_rejects(first.rejects, scored.rejects)
        result.metrics.update(n_rejected=len(rejects), n_without_list=first.n_without_list)
        result.metrics["same_bytes"] = count_same_bytes(catalogue, train)
        if config.recall is not None:
            result.metrics["search"] = approximate_searches(staging.path)
        if chain.evidence_text:
            result.metrics["evidence"] = chain.evidence_text
        with timed(timings, "report"):
            evaluation_output.write(staging.path, result, rejects, fingerprint["config"], details | timings)
        write_json(staging.path / "timings.json", {"seconds": timings, **details})
        staging.finish({"n_rejected": len(rejects)}, rows=len(result.per_query))
    return result.metrics


def _fingerprint(
    catalogue: Catalogue,
    config: FirstStageConfig,
    measure: MeasureConfig,
    work: WorkConfig,
    model: PairwiseModel | None,
    chain: Chain,
) -> dict[str, Any]:
    return artifacts.make_fingerprint(
        "evaluate",
        config=first_stage_settings(config, work)
        | {"scoring": work.fingerprint_settings("score")}
        | _settings(measure),
        catalogue=catalogue.digest(),
        given=input_digests(config),
        model=None if model is None else model.identity(),
        chain=chain.identity(),
    )


def _settings(measure: MeasureConfig) -> dict[str, Any]:
    """What decides the figures, the digest of a file in place of its path."""
    external = {} if measure.external is None else {"external": file_digest(measure.external)}
    return asdict(measure) | external


def _measure(sources: Sources, config: MeasureConfig) -> tuple[Result, dict[str, Any]]:
    """Metrics and diagnostics of the queries, and the seconds of single diagnostics."""
    ranked = sources.ranked
    measured = measure(
        ranked.catalogue, ranked.query_items, ranked.before, ranked.after, ks=config.ks, seed=config.resampling_seed,
        own={name.partition(":")[2]: load_own(name) for name in config.own_metrics},
        searched=None if ranked.chain.adapter is None else ranked.searched,
    )  # fmt: skip
    extra = diagnose(measured, sources, config)
    metrics = measured.metrics | {"chain": ranked.chain.describe()} | extra.figures
    if ranked.after:
        promised = compare_with_promise(ranked.chain, measured.metrics["first_stage"], measured.metrics["difference"])
        metrics |= {"promise": promised} if promised else {}
    by_thing = thing_figures(ranked, ks=config.ks, seed=config.resampling_seed)
    if by_thing:
        metrics["items"] = by_thing
    table = measured.per_query.assign(**extra.columns)
    after = ranked.final if ranked.after else None
    result = Result(
        metrics, table, ranked.first.catalogue, ranked.query_items, ranked.before, after, ranked.chain, ranked.searched,
        explainer_of(sources.model) if ranked.chain.pairwise is not None else None,
        embedding_map(ranked, measured.per_query),
    )  # fmt: skip
    return result, extra.timings
