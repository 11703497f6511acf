"""What unlabelled queries are expected to reach, and the drift alarm: how often is the interval right, and the alarm?

    python benchmarks/label_free.py --catalogue DIR/df.csv --out DIR --model DIR --evaluation DIR \\
        --extractor mobilenetv2_100 --extractor-weights FILE [--other DIR/df.csv]

Evaluation: of the validation split by the model. Its labels are halved --draws times: the lists of one half and their
labels say what to expect of the other half, whose labels are drawn with replacement. A row says how often the true
value lies in the interval, how wide it is on average, and how often the alarm goes off.

Then a fifth of the validation photos become queries against the other photos: as they are, blurred, together with
photos of another catalogue, against half of the gallery. All labels of the evaluation say what to expect. `ours` is the
expectation, `theirs` the truth; the name has the interval and what the alarm says.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from _catalogue import add_catalogue_flags, extractor_of, generate_quick_catalogue, parse_with_catalogue
from _measuring import Row, add_common_flags, against, describe_machine, finish
from PIL import Image, ImageFilter

from distributed_rerank import (
    FirstStageConfig,
    RerankerConfig,
    evaluate,
    load_model_and_chain,
    read_catalogue,
    rerank,
    train,
)
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import TokenSiameseConfig
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_query_gallery
from distributed_rerank.extraction import embed
from distributed_rerank.monitoring.unlabelled import FALSE_ALARMS, expect, labelled_sample
from distributed_rerank.storage.files import write_json
from distributed_rerank.tensors.expected import LabelledSample, drift, expected_values

METRICS = ("CMC@1", "precision@10")
BLUR = 3.0
"""Pixels of a Gaussian."""
N_OTHERS = 150
"""Photos of another catalogue."""


def part_of(sample: LabelledSample, rows: np.ndarray) -> LabelledSample:
    return LabelledSample(sample.signals[rows], sample.values[rows], sample.clusters[rows])


def by_halves(evaluation: Path, n_draws: int) -> list[Row]:
    """Coverage, width and false alarms where the labels of one half speak for those of the other."""
    sample, _ = labelled_sample(evaluation)
    clusters = sample.clusters.numpy()
    labels = np.unique(clusters)
    of_label = {label: np.flatnonzero(clusters == label) for label in labels}
    state = np.random.default_rng(0)
    is_covered, widths, alarms = np.zeros((n_draws, 2)), np.zeros((n_draws, 2)), np.zeros(n_draws)
    for draw in range(n_draws):
        order = state.permutation(labels)
        first, second = order[: len(labels) // 2], order[len(labels) // 2 :]
        known = part_of(sample, np.concatenate([of_label[label] for label in first]))
        fresh = part_of(sample, np.concatenate([of_label[label] for label in second]))
        drawn = part_of(sample, np.concatenate([of_label[label] for label in state.choice(second, len(second))]))
        alarms[draw] = drift(known, fresh.signals, seed=draw) < FALSE_ALARMS
        for number, found in enumerate(expected_values(known, drawn.signals)):
            is_covered[draw, number] = found.low <= float(drawn.values[:, number].mean()) <= found.high
            widths[draw, number] = found.high - found.low
    rows = [against("false alarms", "%", 100 * alarms.mean(), 100 * FALSE_ALARMS)]
    for number, name in enumerate(METRICS):
        rows.append(against(f"{name}: intervals that cover", "%", 100 * is_covered[:, number].mean(), 90.0))
        rows.append(Row(f"{name}: width", "", widths[:, number].mean()))
    return rows


def write_tables(catalogue: Catalogue, other: Catalogue | None, folder: Path) -> dict[str, pd.DataFrame]:
    """Queries as they are, blurred, and of the other catalogue, and two galleries; photos of the blurred ones."""
    state, n = np.random.default_rng(0), len(catalogue)
    is_query = np.zeros(n, bool)
    is_query[state.permutation(n)[: n // 5]] = True
    paths = np.array([ref.path for ref in catalogue.images()])
    names = np.asarray(catalogue.label_names, dtype=object)[catalogue.labels].astype(str)
    table = pd.DataFrame({"id": paths, "path": paths, "label": names})
    asked, gallery = table[is_query], table[~is_query]
    (folder / "blurred").mkdir(parents=True, exist_ok=True)
    blurred = [str((folder / "blurred" / f"{number}.png").absolute()) for number in range(len(asked))]
    for source, target in zip(asked["path"], blurred, strict=True):
        Image.open(source).convert("RGB").filter(ImageFilter.GaussianBlur(BLUR)).save(target)
    queries = {
        "plain": asked.assign(id="plain:" + asked["id"]),
        "blurred": asked.assign(id="blurred:" + asked["id"], path=blurred),
    }
    if other is not None:
        picked = [ref.path for ref in other.images(np.sort(state.permutation(len(other))[:N_OTHERS]))]
        others = pd.DataFrame({"id": picked, "path": picked, "label": "of the other catalogue"})
        queries["with others"] = pd.concat([queries["plain"], others.assign(id="other:" + others["id"])])
    tables = {"gallery": gallery, "half": gallery.iloc[np.sort(state.permutation(len(gallery))[: len(gallery) // 2])]}
    tables |= queries
    for name, part in tables.items():
        part.to_csv(folder / f"{name}.csv", index=False)
    return tables


def by_planted(arguments: argparse.Namespace, folder: Path, extractor: ExtractorConfig) -> list[Row]:
    """Expectation and truth of queries that are asked as ever, and of others."""
    catalogue = read_catalogue(arguments.catalogue, purpose="evaluation").restrict("validation")
    other = None if arguments.other is None else read_catalogue(arguments.other).restrict("validation")
    tables = write_tables(catalogue, other, folder)
    everything = pd.concat(list(tables.values())).drop_duplicates("id")
    everything.to_csv(folder / "all.csv", index=False)
    embed(read_catalogue(str(folder / "all.csv")), extractor, folder / "embeddings")
    model, chain = load_model_and_chain(RerankerConfig(model=str(arguments.model)))
    label_of = dict(zip(everything["id"], everything["label"], strict=True))
    rows = []
    cases = [(name, "gallery") for name in tables if name not in ("gallery", "half")] + [("plain", "half")]
    for queries, gallery in cases:
        out = folder / f"{queries} {gallery}"
        asked = [str(folder / f"{name}.csv") for name in (queries, gallery)]
        lists = FirstStageConfig(embeddings=folder / "embeddings")
        assert model is not None
        rerank(read_query_gallery(*asked), lists, out, model=model, chain=chain)
        found = expect(arguments.evaluation, out)
        table = pq.read_table(out / "reranked.parquet", filters=[("rank", "=", 1)]).to_pandas()
        truth = float((table["query_id"].map(label_of) == table["gallery_id"].map(label_of)).mean())
        first = found["expected"]["cmc@1"]
        low, high = first["ci95"]
        alarm = f"alarm, p {found['drift']['p_value']:.2g}" if found["drift"]["alarm"] else "no alarm"
        name = (
            f"{queries}{', half of the gallery' if gallery == 'half' else ''}: CMC@1 [{low:.3f}, {high:.3f}], {alarm}"
        )
        rows.append(Row(name, "", first["mean"], truth, first["mean"] / truth if truth else None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    add_catalogue_flags(parser)
    parser.add_argument("--model", type=Path, help="folder of `train`; needed unless --quick")
    parser.add_argument("--evaluation", type=Path, help="folder of `evaluate` by that model; needed unless --quick")
    parser.add_argument("--other", help="table of another catalogue, whose photos are asked for too")
    parser.add_argument("--draws", type=int, default=200)
    arguments = parse_with_catalogue(parser)
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.out or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if arguments.quick:
            generate_quick_catalogue(arguments, work)
            arguments.draws, arguments.other = 3, arguments.catalogue
            arguments.model, arguments.evaluation = train_quickly(arguments, work)
        rows = by_halves(arguments.evaluation, arguments.draws)
        rows += by_planted(arguments, work / "planted", extractor_of(arguments))
    finish(rows, arguments.json)


def train_quickly(arguments: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """A model of the quick catalogue with a pairwise step, whatever it is worth, and its evaluation."""
    catalogue, extractor = read_catalogue(arguments.catalogue, purpose="evaluation"), extractor_of(arguments)
    train(catalogue, TokenSiameseConfig(extractor=extractor), TrainingConfig(epochs=1), work / "model")
    write_json(work / "model" / "chain.json", {"schema_version": 2, "steps": [{"step": "pairwise", "top_n": 10}]})
    (work / "model" / "manifest.json").unlink()
    model, chain = load_model_and_chain(RerankerConfig(model=str(work / "model")))
    lists = FirstStageConfig(extractor=extractor)
    evaluate(catalogue.restrict("validation"), lists, work / "evaluation", model=model, chain=chain)
    assert json.loads((work / "evaluation" / "metrics.json").read_text())["reranked"]
    return work / "model", work / "evaluation"


if __name__ == "__main__":
    main()
