"""Several results on one catalogue, every two compared query by query, with Holm's correction for their number."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from distributed_rerank.config.choices import MissingLists
from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.relevance import without_junk
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.measure import measure
from distributed_rerank.monitoring.comparison import final_values, fingerprint_of, require_same_catalogue
from distributed_rerank.report import comparison_table
from distributed_rerank.reranking.external_candidates import external_candidates, settle_missing_lists
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import file_digest, write_json
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.metrics import means

METRICS = ("map@10", "cmc@1")
N_RESAMPLES = 10_000
"""More than elsewhere: Holm multiplies p-values by the number of comparisons, and none is below 1 / this."""


@dataclass(frozen=True, eq=False)
class Result:
    """The final ranking of one side, measured."""

    name: str
    catalogue: str
    """Digest."""
    values: pd.DataFrame
    """label, n_relevant and METRICS among others, by query id ascending."""
    n_missing: int = 0
    """Queries that a file has no list for."""
    left_out: pd.Index = field(default_factory=lambda: pd.Index([]))
    """Those of them that no result is to count."""


def compare_all(
    paths: Sequence[Path],
    out: Path,
    *,
    catalogue: Catalogue | None = None,
    missing_lists: MissingLists = "error",
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Compare every two of `paths` into the folder `out`; returns the table as Markdown.

    A folder is one of `evaluate`; a file has lists of another system for the queries of `catalogue`, and images that an
    evaluation among the paths rejected do not count. `missing_lists` says what becomes of a query that a file has no
    list for: it is refused, the file finds nothing for it, or no result counts it. Raises BadInput for folders that are
    no evaluations, and where catalogues, queries, labels or relevant items differ, naming the difference.
    """
    folders = [path for path in paths if path.is_dir()]
    rejected = frozenset(
        id for folder in folders for id in tables.read_table(folder, "rejects")["id"].to_pylist()
    )  # fmt: skip
    names = _names(paths)
    results = [
        _of_folder(path, name) if path.is_dir() else _of_file(path, name, catalogue, rejected, missing_lists)
        for path, name in zip(paths, names, strict=True)
    ]
    results = _on_listed_queries(results)
    for result in results[1:]:
        _require_same(results[0], result)
    files = [path / "per_query.parquet" if path.is_dir() else path for path in paths]
    sources = {name: file_digest(file) for name, file in zip(names, files, strict=True)}
    fingerprint = artifacts.make_fingerprint(
        "compare", catalogue=results[0].catalogue, sources=sources, seed=seed, rejected=sorted(rejected),
        **({} if missing_lists == "error" else {"missing_lists": missing_lists}),
    )  # fmt: skip
    if not (artifacts.recover(out, fingerprint, overwrite) or artifacts.is_complete(out, fingerprint, overwrite)):
        summary = summarise(results, seed, missing_lists)
        with artifacts.stage(out, fingerprint, overwrite) as staging:
            write_json(staging.path / "comparison.json", summary)
            for kind, text in comparison_table.in_all_formats(summary).items():
                (staging.path / f"comparison.{kind}").write_text(text, encoding="utf-8")
            staging.finish()
    return (out / "comparison.md").read_text(encoding="utf-8")


def summarise(results: Sequence[Result], seed: int, missing_lists: MissingLists = "error") -> dict[str, Any]:
    """The figures of the results, and of every two of them run - baseline, as plain JSON."""
    first = results[0].values
    labels = torch.from_numpy(np.unique(first["label"].astype(str), return_inverse=True)[1].astype(np.int64))
    sides = [{key: torch.tensor(result.values[key].to_numpy()) for key in METRICS} for result in results]
    pairs = [
        {"baseline": results[a].name, "run": results[b].name, "metric": key, **found}
        for a, b in itertools.combinations(range(len(results)), 2)
        for key, found in statistics.compare_to_json(
            sides[a], sides[b], labels, seed=seed, n_resamples=N_RESAMPLES
        ).items()
    ]
    corrected = statistics.holm([pair["p_value"] for pair in pairs])
    return {
        "catalogue": results[0].catalogue,
        "n_queries": len(first),
        "n_labels": int(labels.max()) + 1,
        "missing_lists": missing_lists,
        "n_missing": {result.name: result.n_missing for result in results if result.n_missing},
        "runs": [{"name": result.name, **means(side)} for result, side in zip(results, sides, strict=True)],
        "pairs": [{**pair, "p_holm": value} for pair, value in zip(pairs, corrected, strict=True)],
    }


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, or the whole paths where two would be called the same."""
    twice = [path for path in paths if sum(path.resolve() == other.resolve() for other in paths) > 1]
    if twice:
        raise BadInput(f"{twice[0]} is given twice; give each result once")
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _of_folder(folder: Path, name: str) -> Result:
    digest = fingerprint_of(folder)["catalogue"]
    values = final_values(folder).sort_index()
    absent = [key for key in METRICS if key not in values]
    if absent:
        raise BadInput(f"{folder} has no {absent[0]}; evaluate with --ks 1 10 among others")
    n_relevant = tables.read_table(folder, "per_query").to_pandas().set_index("query_id")["n_relevant"]
    return Result(name, digest, values[["label", *METRICS]].join(n_relevant))


def _of_file(
    path: Path, name: str, catalogue: Catalogue | None, rejected: frozenset[str], missing: MissingLists
) -> Result:
    if catalogue is None:
        raise BadInput(f"{path} is a file with lists: give the --catalogue that says what is relevant")
    digest = catalogue.digest()
    if rejected:
        catalogue = catalogue.take(np.flatnonzero([id not in rejected for id in catalogue.ids]))
    lists = without_junk(external_candidates(catalogue, path, rejected), catalogue)
    asked = pd.Index(catalogue.ids[catalogue.query_items])
    catalogue, n_missing = settle_missing_lists(catalogue, lists, missing, path)
    queries = torch.from_numpy(catalogue.query_items)
    left_out = asked.difference(pd.Index(catalogue.ids[catalogue.query_items]))
    measured = measure(catalogue, queries, lists.of_queries(queries), {}, ks=(1, 10), n_resamples=1)
    table = measured.per_query.set_index("query_id").rename(columns={f"{key}_before": key for key in METRICS})
    return Result(name, digest, table.sort_index(), n_missing, left_out)


def _on_listed_queries(results: Sequence[Result]) -> list[Result]:
    """The results without the queries that one of them leaves out. Raises BadInput where none is left."""
    left_out = pd.Index([]).append([result.left_out for result in results])
    if not len(left_out):
        return list(results)
    kept = [replace(result, values=result.values[~result.values.index.isin(left_out)]) for result in results]
    if not len(kept[0].values):
        raise BadInput("no query has a list in every file; compare fewer files, or give --missing-lists miss")
    return kept


def _require_same(first: Result, other: Result) -> None:
    require_same_catalogue(first.name, first.catalogue, other.name, other.catalogue)
    for one, two in ((first, other), (other, first)):
        alone = one.values.index.difference(two.values.index)
        if len(alone):
            raise BadInput(
                f"{one.name} measured {len(alone)} queries that {two.name} did not, first {alone[0]!r}; "
                "evaluate both with the same rejects, lists and split"
            )
    for column in ("label", "n_relevant"):
        is_other = first.values[column].astype(str) != other.values[column].astype(str)
        if bool(is_other.to_numpy().any()):
            id = first.values.index[is_other.to_numpy()][0]
            raise BadInput(
                f"query {id!r} has {column} {first.values[column][id]} in {first.name} and {other.values[column][id]} "
                f"in {other.name}; evaluate both on the same images"
            )
