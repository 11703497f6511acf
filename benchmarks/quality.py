"""What re-ranking is worth on a catalogue: OML's recipe, our defaults and methods without training, at equal minutes.

    python benchmarks/quality.py --catalogue DIR/df.csv --extractor mobilenetv2_100 --extractor-weights FILE

Every method sees the same embeddings, candidates, validation queries and at most the same minutes of training on the
train split. Intervals are 95 %, bootstrap by label, of the gain over the first stage on the validation split. OML's
recipe: ConcatSiamese, balanced batches with hard pairs of fixed embeddings, BCE, Adam with all weights at 1e-4, the
last weights, the first top_n replaced by the pair's own order. In the rows `theirs` is the first stage unless they
say otherwise.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _catalogue import add_catalogue_flags, extractor_of, generate_quick_catalogue, parse_with_catalogue
from _measuring import Row, add_common_flags, describe_machine, finish

from distributed_rerank.chain.chain import AlphaQEStep, Chain, KReciprocalStep, PairwiseStep
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig
from distributed_rerank.config.pairwise import (
    PAIRWISE_CONFIGS,
)
from distributed_rerank.config.training import TrainingConfig, defaults_for
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.extraction import embed
from distributed_rerank.models.saving import load_model
from distributed_rerank.training.stage import train

WITHOUT_TRAINING = {
    "k-reciprocal (20, 6, 0.3)": Chain((KReciprocalStep(),)),
    "alpha-QE + DBA (5, 3)": Chain((AlphaQEStep(),)),
}
RUNS_OF_FITTED_MODELS = 3
"""A model with fitted projections is trained on each half of the labels and on all; they share the minutes."""
METRICS = ("map@10", "cmc@1")


@dataclass(frozen=True)
class Result:
    """One method with one seed: what metrics.json says, and what it took."""

    method: str
    seed: int | None
    metrics: dict[str, Any]
    chain: str
    seconds: float = 0.0

    def figure(self, key: str) -> float:
        """The metric after the method; of the first stage itself where nothing was re-ranked."""
        return self.metrics.get("reranked", self.metrics["first_stage"])[key]

    def gain(self, key: str) -> tuple[float, float, float]:
        """Points over the first stage and the ends of their interval."""
        if "difference" not in self.metrics:
            return 0.0, 0.0, 0.0
        found = self.metrics["difference"][key]
        return 100 * found["mean"], 100 * found["ci95"][0], 100 * found["ci95"][1]


class Trial:
    """A catalogue with its embeddings, on which methods are tried."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments = arguments
        self.work = work
        self.extractor = extractor_of(arguments)
        self.training: Catalogue = read_catalogue(arguments.catalogue, purpose="training")
        whole = read_catalogue(arguments.catalogue, purpose="evaluation")
        self.validation = whole.restrict("validation")
        embed(self.validation, self.extractor, work / "embeddings")
        self.config = FirstStageConfig(embeddings=work / "embeddings")

    def evaluate(self, name: str, chain: Chain, model: Path | None = None) -> dict[str, Any]:
        """Metrics of a chain on the validation split; the model is loaded where the chain has a pairwise step."""
        loaded = None if model is None or chain.pairwise is None else load_model(model)
        return evaluate(
            self.validation,
            self.config,
            self.work / name,
            model=loaded,
            chain=chain,
            measure=MeasureConfig(baselines=False),
        )

    def train(self, name: str, model: str, config: TrainingConfig, seed: int) -> tuple[Path, Chain, float]:
        """A trained model's folder, its chain, and the seconds that training took with everything around it."""
        folder, started = self.work / f"{name}-{seed}", time.perf_counter()
        if self.arguments.quick:
            config = replace(config, epochs=1, steps_per_epoch=2, n_labels=4, n_instances=2, lists_per_step=4)
        model_config = PAIRWISE_CONFIGS[model](extractor=self.extractor, head_seed=seed)
        chain = train(
            self.training, model_config, replace(config, seed=seed), folder,
            embeddings_folder=self.work / "train-embeddings",
        )  # fmt: skip
        return folder, chain, time.perf_counter() - started

    def oml(self, seed: int) -> Result:
        """OML's recipe."""
        config = TrainingConfig(
            minutes=self.arguments.oml_minutes or self.arguments.minutes, epochs=100_000, mining="batch", loss="bce",
            lr=1e-4, backbone_lr=1e-4, n_labels=min(30, int(0.9 * self.n_train_labels())), weight_decay=0.0,
            clip_norm=0.0, warmup_steps=0, schedule="constant", set_aside=0.05, top_n=10,
        )  # fmt: skip
        folder, _, seconds = self.train("oml", "concat", config, seed)
        chain = Chain((PairwiseStep(top_n=self.arguments.top_n, rule="replace"),))
        metrics = self.evaluate(f"oml-{seed}-evaluation", chain, folder)
        return Result("OML recipe", seed, metrics, chain.describe(), seconds)

    def n_train_labels(self) -> int:
        return len(self.training.restrict("train").label_names)

    def ours(self, model: str, seed: int) -> list[Result]:
        """Our default for a pairwise model: the adapted first stage, its pairwise step alone, and the whole chain."""
        runs = RUNS_OF_FITTED_MODELS if model == "token" else 1
        config = replace(defaults_for(model), minutes=self.arguments.minutes / runs)
        folder, chain, seconds = self.train(model, model, config, seed)
        start = chain.before_search
        adapted = Chain(start, adapter=chain.adapter)
        alone = replace(adapted, steps=(*start, *((chain.pairwise,) if chain.pairwise else ())))
        return [
            Result(
                f"{model}, {name}",
                seed,
                self.evaluate(f"{model}-{seed}-{name}", steps, folder),
                steps.describe(),
                seconds,
            )
            for name, steps in (("adapted", adapted), ("pairwise step", alone), ("chain", chain))
        ]


def run(trial: Trial, arguments: argparse.Namespace) -> list[Result]:
    """All methods, those without training once, the others with every seed."""
    results = [Result("first stage", None, trial.evaluate("first-stage", Chain()), "")]
    for number, (name, chain) in enumerate(WITHOUT_TRAINING.items()):
        results.append(Result(name, None, trial.evaluate(f"baseline-{number}", chain), chain.describe()))
    for seed in range(arguments.seeds):
        if seed < (arguments.seeds if arguments.oml_seeds is None else arguments.oml_seeds):
            results.append(trial.oml(seed))
            show(results[-1:])
        for model in arguments.models:
            try:
                results += trial.ours(model, seed)
                show(results[-3:])
            except BadInput as error:
                print(f"{model} is left out: {error}", flush=True)
    return results


def show(results: Sequence[Result]) -> None:
    """One line for each: figures in percent, gains in points with their intervals."""
    for result in results:
        cells = [f"{key} {100 * result.figure(key):5.1f} ({_gain(result, key)})" for key in METRICS]
        seed = "" if result.seed is None else f"seed {result.seed}"
        print(f"{result.method:28} {seed:7} {'  '.join(cells)}  {result.seconds:5.0f} s  {result.chain}", flush=True)


def _gain(result: Result, key: str) -> str:
    mean, low, high = result.gain(key)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Every result, then means over the seeds, each of ours against OML's recipe too."""
    rows = []
    for result in results:
        name = result.method if result.seed is None else f"{result.method}, seed {result.seed}"
        for key in METRICS:
            first = result.metrics["first_stage"][key]
            rows.append(
                Row(f"{name}: {key}", "fraction", result.figure(key), first, result.figure(key) / max(first, 1e-9))
            )
            for end, value in zip(("gain", "gain, low end", "gain, high end"), result.gain(key), strict=True):
                rows.append(Row(f"{name}: {key} {end}", "points", value))
        if result.seconds:
            rows.append(Row(f"{name}: training", "s", result.seconds))
    methods = dict.fromkeys(result.method for result in results if result.seed is not None)
    for key in METRICS:
        means = {m: statistics.mean(r.figure(key) for r in results if r.method == m) for m in methods}
        if "OML recipe" not in means:
            continue
        oml = means.pop("OML recipe")
        for method, mean in means.items():
            rows.append(
                Row(
                    f"{method}, mean of the seeds, against the OML recipe: {key}",
                    "fraction",
                    mean,
                    oml,
                    mean / max(oml, 1e-9),
                )
            )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    add_catalogue_flags(parser)
    parser.add_argument("--models", nargs="*", choices=tuple(PAIRWISE_CONFIGS), default=("token", "concat", "distance"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, at most, for each method and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--oml-seeds", type=int, help="seeds of OML's recipe, 0 leaves it out; default: as --seeds")
    parser.add_argument("--oml-minutes", type=float, help="of training of OML's recipe; default: as --minutes")
    parser.add_argument("--top-n", type=int, default=10, help="of OML's recipe")
    parser.add_argument(
        "--threads", type=int, default=2, help="of everything but training, which keeps its own default"
    )
    return parse_with_catalogue(parser)


def main() -> None:
    arguments = parse()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(arguments.threads)
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.out or Path(temporary)
        if arguments.quick:
            generate_quick_catalogue(arguments, work)
            arguments.seeds, arguments.minutes, arguments.models = 1, 0.05, ("token", "concat")
        results = run(Trial(arguments, work), arguments)
        print()
        show(results)
        finish(rows_of(results), arguments.json)


if __name__ == "__main__":
    main()
