"""What a small catalogue gains: the train split cut to a few labels of a few photos, ten draws of each size.

    python benchmarks/few_labels.py --catalogue DIR/df.csv --out DIR --extractor mobilenetv2_100 \\
        --extractor-weights FILE

Every draw trains the token model with default arguments on the drawn labels and measures the chosen chain on the whole
validation split. Frozen features are computed once and kept in --out. `ours` is the gain over the first stage in points
of mAP@10: the mean of the draws, the worst draw, and the number of draws in which a step was taken. `theirs` of that
number: draws in which the pairwise step would have passed a randomisation test with p < 0.01, which no gain of 4 labels
can.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _catalogue import add_catalogue_flags, extractor_of, generate_quick_catalogue, parse_with_catalogue
from _measuring import Row, add_common_flags, describe_machine, finish

from distributed_rerank.chain.chain import AdaptStep, Chain
from distributed_rerank.chain.evidence import Evidence
from distributed_rerank.chain.trials import try_chain
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import TokenSiameseConfig
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.extraction import embed
from distributed_rerank.models.saving import build_model, load_model
from distributed_rerank.tensors import metrics
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.training.encodings import FULL_ENCODER
from distributed_rerank.training.images import DecodedImages, block_path
from distributed_rerank.training.run import results, train_all
from distributed_rerank.training.stage import choose_chain, make_task
from distributed_rerank.training.state import load_state, write_state
from distributed_rerank.training.task import TrainingWorker

SIZES = (4, 6, 10, 20)
TOP_N, N_ITEMS = 50, 100


class Data:
    """A catalogue with embeddings and the frozen features of the token model, computed once."""

    def __init__(self, table: str, extractor: ExtractorConfig, work: Path) -> None:
        self.model_config = TokenSiameseConfig(extractor=extractor)
        whole = read_catalogue(table, purpose="evaluation")
        self.train, self.validation = (whole.restrict(name).as_query_and_gallery() for name in ("train", "validation"))
        self.embeddings = embed(whole, extractor, work / "embeddings")
        self.features = {name: self._features(part, work / f"{name}.pt") for name, part in self.parts().items()}

    def parts(self) -> dict[str, Catalogue]:
        return {"train": self.train, "validation": self.validation}

    def _features(self, part: Catalogue, path: Path) -> torch.Tensor:
        if not path.is_file():
            model = build_model(self.model_config)
            images = DecodedImages(part, model.transform, TrainingConfig(), "cpu")
            ready: Any = model.prepare_for_inference("cpu")
            with torch.no_grad():
                blocks = [ready.local_features(images.plain(b)) for b in torch.arange(len(part)).split(64)]
            torch.save(torch.cat(blocks), path)
        return torch.load(path)

    def draw(self, n_labels: int, n_images: int, seed: int) -> np.ndarray:
        """Items of `n_images` photos of `n_labels` train labels, drawn by `seed`."""
        state, labels = np.random.default_rng([seed, n_labels]), self.train.labels
        known, counts = np.unique(labels, return_counts=True)
        drawn = state.permutation(known[counts >= n_images])[:n_labels]
        return np.sort(
            np.concatenate([state.permutation(np.flatnonzero(labels == label))[:n_images] for label in drawn])
        )


def measure(data: Data, items: np.ndarray, seed: int, folder: Path) -> tuple[float, bool, bool]:
    """Points of mAP@10 over the first stage, whether a step was taken, and whether p < 0.01 would have taken it."""
    config = TrainingConfig(seed=seed)
    task = make_task(data.train.take(items), data.embeddings, data.model_config, config, folder)
    features = data.features["train"][torch.from_numpy(items)]
    for number, block in enumerate(features.split(config.encode_block)):
        path = block_path(folder / "run" / "encodings" / "features", 0, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state(block.clone(), path)
    state = train_all(task, folder / "run", TrainingWorker(), None, lambda state, figures: None)
    of_runs = results(state)
    chain = choose_chain(task, of_runs)
    model = load_model(folder / "run" / "encodings" / FULL_ENCODER)
    load_state(model, of_runs[-1]["best"]["model"])
    plain = evidence_on(data, model, data.embeddings)
    adapter, steps = chain.adapter, [step for step in chain.steps if not isinstance(step, AdaptStep)]
    mapped = data.embeddings if adapter is None else Embeddings(data.embeddings.ids, adapter(data.embeddings.matrix[:]))
    before = try_chain(plain, Chain()).figures()["map@10"]
    after = try_chain(evidence_on(data, model, mapped), Chain(tuple(steps))).figures()["map@10"]
    rise = chain.chosen_on["decisions"][0]["gain"]["objective"] if chain.chosen_on["decisions"] else None
    would = rise is not None and rise["p_value"] < 0.01 and rise["ci95"][0] > 0
    return 100 * (after - before), bool(chain.steps), would


def evidence_on(data: Data, model: object, embeddings: Embeddings) -> Evidence:
    """The validation split with logits of the model, searched over these embeddings."""
    part = data.validation
    x, items = torch.from_numpy(embeddings.matrix[embeddings.rows_of(part.ids)]), torch.arange(len(part))
    lists = nearest(x, x, query_items=items, gallery_items=items, n_items=min(N_ITEMS, len(part) - 1))
    labels, logits = torch.from_numpy(part.labels.astype(np.int64)), torch.full((len(part), TOP_N), torch.nan)
    with torch.no_grad():
        blocks = data.features["validation"].split(256)
        encoded = torch.cat([model.encode_features(block) for block in blocks])  # pyright: ignore
        for rows in items.split(64):
            found, distances = lists.items[rows, :TOP_N], lists.distances[rows, :TOP_N]
            queries = rows[:, None].expand_as(found)
            scored = model(encoded[queries.flatten()], encoded[found.flatten()], distances.flatten())  # pyright: ignore
            logits[rows, : found.shape[1]] = scored.view(found.shape)
    n_relevant = metrics.count_relevant(items, labels, None, items, labels, None)
    return Evidence(lists, labels, n_relevant, logits[:, : lists.items.shape[1]], x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    add_catalogue_flags(parser)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="train labels")
    parser.add_argument("--images", type=int, default=8, help="photos of each label")
    parser.add_argument("--draws", type=int, default=10)
    arguments = parse_with_catalogue(parser)
    print(describe_machine(), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.out or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if arguments.quick:
            generate_quick_catalogue(arguments, work)
            arguments.sizes, arguments.draws, arguments.images = (4,), 2, 3
        data = Data(arguments.catalogue, extractor_of(arguments), work)
        for size in arguments.sizes:
            found = []
            for seed in range(arguments.draws):
                with tempfile.TemporaryDirectory() as folder:
                    found.append(measure(data, data.draw(size, arguments.images, seed), seed, Path(folder)))
                print(f"{size} labels, draw {seed}: {found[-1][0]:+.2f}, a step taken: {found[-1][1]}", flush=True)
            gains = [gain for gain, _, _ in found]
            rows += [
                Row(f"{size} labels: mean gain", "points", statistics.mean(gains)),
                Row(f"{size} labels: worst draw", "points", min(gains)),
                Row(f"{size} labels: draws with a step", "", sum(t for _, t, _ in found), sum(w for _, _, w in found)),
            ]
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
