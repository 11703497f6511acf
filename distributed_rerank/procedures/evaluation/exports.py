"""An evaluation folder in formats that others read: TREC run and qrels, Markdown for a pull request. Layer 3."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distributed_rerank.data import artifacts, tables
from distributed_rerank.data.candidates import read_candidates
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.exports import write_qrels, write_trec_run
from distributed_rerank.errors import BadInput
from distributed_rerank.procedures.report.wording import count_of, fraction, metric_name, p_value, signed, verdict

RUN_BEFORE, RUN_AFTER, QRELS = "first_stage.trec", "reranked.trec", "qrels.trec"


def export_trec(folder: Path, catalogue: Catalogue, out: Path, candidates: Path | None = None) -> list[Path]:
    """Write the evaluation `folder` as `first_stage.trec`, `reranked.trec` (if re-ranked) and `qrels.trec` into `out`.

    `catalogue` is the one evaluated, restricted to its split; `candidates` the first stage's lists where these were
    given to the evaluation. The files hold exactly the queries that were measured (those with a relevant item), without
    rejected images, so any tool that averages over the judged queries finds our figures: cmc@k as success@k,
    precision@k, recall@k, mrr, and map@k where no query has more than k relevant items (TREC divides by their number,
    we by min(k, number)). Returns the files.

    Raises BadInput for a catalogue of another digest and for missing first-stage lists.
    """
    made_with = artifacts.read_manifest(folder)["fingerprint"].get("catalogue")
    if made_with != catalogue.digest():
        raise BadInput(
            f"{folder} was evaluated with catalogue {str(made_with)[:16]}, this one is {catalogue.digest()[:16]}; "
            "give the same --catalogue and --split"
        )
    measured = tables.read_table(folder, "per_query").to_pandas()
    catalogue = _without(catalogue, tables.read_table(folder, "rejects")["id"].to_pylist())
    out.mkdir(parents=True, exist_ok=True)
    queries = measured["query_id"].tolist()
    write_trec_run(out / RUN_BEFORE, _usable(_first_stage(folder, candidates), catalogue, queries), "first_stage")
    written = [out / RUN_BEFORE]
    if (folder / "reranked.parquet").is_file():
        after = tables.read_table(folder / "reranked.parquet", "candidates")
        write_trec_run(out / RUN_AFTER, _usable(after, catalogue, queries), "reranked")
        written.append(out / RUN_AFTER)
    write_qrels(out / QRELS, relevant_ids(catalogue, queries, measured["n_relevant"].tolist()))
    return [*written, out / QRELS]


def relevant_ids(
    catalogue: Catalogue, queries: Sequence[str], n_relevant: Sequence[int]
) -> Iterator[tuple[str, list[str]]]:
    """Each query and the ids relevant to it: gallery items of its label, not itself, not its sequence; in id order."""
    gallery, labels, sequences = catalogue.gallery_items, catalogue.labels, catalogue.sequences
    by_label = gallery[np.argsort(labels[gallery], kind="stable")]
    ordered = labels[by_label]
    for query, expected, item in zip(queries, n_relevant, catalogue.items_of(queries).tolist(), strict=True):
        low, high = np.searchsorted(ordered, [labels[item], labels[item] + 1])
        same = by_label[low:high]
        own = (same == item) | ((sequences[item] >= 0) & (sequences[same] == sequences[item]))
        found = catalogue.ids[same[~own]].tolist()
        assert len(found) == expected, f"query {query!r} has {len(found)} relevant items, measured were {expected}"
        yield query, found


def _first_stage(folder: Path, candidates: Path | None) -> pa.Table:
    own = folder / "candidates"
    if candidates is None and not own.is_dir():
        raise BadInput(f"{folder} holds no first-stage lists, they were given to it; give the same --candidates")
    return read_candidates(own if candidates is None else candidates)


def _without(catalogue: Catalogue, rejected: Sequence[str]) -> Catalogue:
    """The catalogue without these ids, as far as it has them."""
    return catalogue.take(np.flatnonzero(~np.isin(catalogue.ids.astype(str), np.asarray(rejected, str))))


def _usable(table: pa.Table, catalogue: Catalogue, queries: Sequence[str]) -> pa.Table:
    """The rows that were measured: a measured query and a gallery item that is neither itself nor of its sequence.

    Sorted by query and rank, ranks counted anew from 1.
    """
    frame = table.to_pandas()
    known = catalogue.ids[catalogue.gallery_items]
    frame = frame[frame["query_id"].isin(list(queries)) & frame["gallery_id"].isin(known)]
    query, item = (catalogue.items_of(frame[name].to_numpy()) for name in ("query_id", "gallery_id"))
    sequences = catalogue.sequences
    own = (query == item) | ((sequences[query] >= 0) & (sequences[query] == sequences[item]))
    frame = frame[~own].sort_values(["query_id", "rank"], kind="stable", ignore_index=True)
    frame["rank"] = (frame.groupby("query_id").cumcount() + 1).astype(np.int32)
    return tables.conform(pa.Table.from_pandas(frame, preserve_index=False), "candidates")


def export_markdown(folder: Path, path: Path) -> None:
    """Write `markdown_summary` of the evaluation `folder` to the file `path`."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with artifacts.atomic_path(path) as temporary:
        temporary.write_text(markdown_summary(metrics), encoding="utf-8")


def markdown_summary(metrics: Mapping[str, Any]) -> str:
    """What metrics.json says, for a pull request: the verdict, what was measured, a table with intervals."""
    is_reranked = bool(metrics.get("reranked"))
    told = verdict(metrics, is_reranked)
    counts = f"{count_of(metrics['n_queries'])} queries, {count_of(metrics['n_gallery'])} gallery items"
    for key, words in (("n_without_relevant", "queries without a relevant item"), ("n_rejected", "images rejected")):
        if metrics.get(key):
            counts += f", {count_of(metrics[key])} {words}"
    chain = metrics.get("chain") or "first stage"
    lines = [f"**{told.sentence}** {told.detail}".rstrip(), "", f"{counts}; chain: {chain}", ""]
    if not is_reranked:
        lines += ["| metric | first stage |", "|:--|--:|"]
        lines += [f"| {metric_name(key)} | {fraction(value)} |" for key, value in metrics["first_stage"].items()]
        return "\n".join(lines) + "\n"
    lines += ["| metric | before | after | change | 95 % interval | p |", "|:--|--:|--:|--:|:-:|--:|"]
    for key, before in metrics["first_stage"].items():
        compared = metrics["difference"][key]
        interval = " to ".join(signed(end) for end in compared["ci95"])
        cells = [fraction(before), fraction(metrics["reranked"][key]), signed(compared["mean"])]
        lines.append(f"| {' | '.join([metric_name(key), *cells, interval, p_value(compared['p_value'])])} |")
    return "\n".join(lines) + "\n"
