"""An evaluation folder in formats that other tools read: TREC run and qrels, Markdown for a pull request."""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from distributed_rerank.data import tables
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.exports import write_qrels, write_trec_run
from distributed_rerank.data.judgements import Judgements
from distributed_rerank.data.relevance import without_junk
from distributed_rerank.errors import BadInput
from distributed_rerank.report.formatting import count_of, fraction, in_table_order, interval, metric_name, signed
from distributed_rerank.report.verdict import verdict
from distributed_rerank.reranking.external_candidates import external_candidates
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import atomic_path
from distributed_rerank.tensors import sharding

QUERIES_PER_BATCH = 1 << 12
RUN_BEFORE, RUN_AFTER, QRELS = "first_stage.trec", "reranked.trec", "qrels.trec"


def export_trec(folder: Path, catalogue: Catalogue, out: Path, candidates: Path | None = None) -> list[Path]:
    """Write the evaluation `folder` as `first_stage.trec`, `reranked.trec` (if re-ranked) and `qrels.trec` into `out`.

    `catalogue` is the one evaluated, restricted to its split. `candidates` are the first stage's lists if the
    evaluation was given some. The files hold exactly the queries that were measured (those with a relevant item) and no
    rejected images, so any tool that averages over the judged queries gets our figures: cmc@k as success@k,
    precision@k, recall@k, mrr, and map@k where no query has more than k relevant items (TREC divides by their number,
    we by min(k, number)). Returns the files.

    Raises BadInput for a catalogue of another digest and for missing first-stage lists.
    """
    evaluated = artifacts.read_manifest(folder)["fingerprint"].get("catalogue")
    if evaluated != catalogue.digest():
        raise BadInput(
            f"{folder} was evaluated with catalogue {str(evaluated)[:16]}, this one is {catalogue.digest()[:16]}; "
            "give the same --catalogue and --split"
        )
    measured = tables.read_table(folder, "per_query").select(["query_id", "n_relevant"]).to_pandas()
    rejected = set(tables.read_table(folder, "rejects")["id"].to_pylist())
    if rejected:
        catalogue = catalogue.take(np.flatnonzero([id not in rejected for id in catalogue.ids]))
    out.mkdir(parents=True, exist_ok=True)
    queries = measured["query_id"].tolist()
    written = [out / RUN_BEFORE]
    first_stage = _batches(_first_stage(folder, candidates), rejected, catalogue, queries)
    write_trec_run(out / RUN_BEFORE, first_stage, "first_stage")
    if (folder / "reranked.parquet").is_file():
        after = _batches(folder / "reranked.parquet", rejected, catalogue, queries)
        write_trec_run(out / RUN_AFTER, after, "reranked")
        written.append(out / RUN_AFTER)
    write_qrels(out / QRELS, relevant_ids(catalogue, queries, measured["n_relevant"].tolist()))
    return [*written, out / QRELS]


def relevant_ids(
    catalogue: Catalogue, queries: Sequence[str], n_relevant: Sequence[int]
) -> Iterator[tuple[str, list[str]]]:
    """Each query with its relevant ids in id order: gallery items of its label but not of its sequence, nor itself.

    Where the catalogue has judgements, those with a grade above 0.
    """
    if catalogue.judgements is not None:
        yield from _judged_ids(catalogue, catalogue.judgements, queries)
        return
    gallery, labels, sequences = catalogue.gallery_items, catalogue.labels, catalogue.sequences
    by_label = gallery[np.argsort(labels[gallery], kind="stable")]
    ordered = labels[by_label]
    for query, expected, item in zip(queries, n_relevant, catalogue.items_of(queries).tolist(), strict=True):
        low, high = np.searchsorted(ordered, [labels[item], labels[item] + 1])
        same = by_label[low:high]
        own = (same == item) | ((sequences[item] >= 0) & (sequences[same] == sequences[item]))
        relevant = catalogue.ids[same[~own]].tolist()
        assert len(relevant) == expected, f"query {query!r} has {len(relevant)} relevant items, not {expected}"
        yield query, relevant


def _judged_ids(
    catalogue: Catalogue, judgements: Judgements, queries: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    asked, candidates, grades = judgements.pairs(catalogue.ids)
    for query, item in zip(queries, catalogue.items_of(queries).tolist(), strict=True):
        yield query, catalogue.ids[np.sort(candidates[(asked == item) & (grades > 0)])].tolist()


def _first_stage(folder: Path, candidates: Path | None) -> Path:
    own = folder / "candidates"
    if candidates is None and not own.is_dir():
        raise BadInput(f"{folder} holds no first-stage lists: it was given some; give the same --candidates")
    return own if own.is_dir() or candidates is None else candidates


def _batches(path: Path, rejected: Set[str], catalogue: Catalogue, queries: Sequence[str]) -> Iterator[pa.Table]:
    """The measured lists at `path` as candidates tables of some queries each, by query id and rank."""
    lists = without_junk(external_candidates(catalogue, path, rejected), catalogue)
    wanted = torch.from_numpy(catalogue.items_of(queries))
    rows = torch.isin(lists.query_items, wanted).nonzero()[:, 0]
    for start, stop in sharding.blocks(len(rows), QUERIES_PER_BATCH):
        yield candidates_table(lists[rows[start:stop]], catalogue.ids)


def export_markdown(folder: Path, path: Path) -> None:
    """Write `markdown_summary` of the evaluation `folder` to the file `path`."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(markdown_summary(metrics), encoding="utf-8")


def markdown_summary(metrics: Mapping[str, Any]) -> str:
    """metrics.json for a pull request: the verdict, what was measured, a table with intervals."""
    outcome = verdict(metrics)
    counts = f"{count_of(metrics['n_queries'])} queries, {count_of(metrics['n_gallery'])} gallery items"
    left_out = (
        ("n_without_relevant", "queries without a relevant item"),
        ("n_without_list", "queries without a list"),
        ("n_rejected", "images rejected"),
    )
    for key, words in left_out:
        if metrics.get(key):
            counts += f", {count_of(metrics[key])} {words}"
    chain = metrics.get("chain") or "first stage"
    words = f"{outcome.plain} {outcome.sentence}".strip()
    lines = [f"**{words}** {outcome.detail}", "", f"{counts}; chain: {chain}", ""]
    keys = in_table_order(metrics["first_stage"])
    if not metrics.get("reranked"):
        lines += ["| metric | first stage |", "|:--|--:|"]
        lines += [f"| {metric_name(key)} | {fraction(metrics['first_stage'][key])} |" for key in keys]
        return "\n".join(lines) + "\n"
    lines += ["| metric | before | after | change | 95 % interval |", "|:--|--:|--:|--:|:-:|"]
    for key in keys:
        before, after, compared = (metrics[part][key] for part in ("first_stage", "reranked", "difference"))
        cells = [metric_name(key), fraction(before), fraction(after), signed(compared["mean"])]
        lines.append(f"| {' | '.join([*cells, interval(compared)])} |")
    return "\n".join(lines) + "\n"
