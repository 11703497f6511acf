"""A slow teacher and a fast student: what the teacher gains, how much of it the student keeps, at how many pairs/s.

    python benchmarks/distillation.py --catalogue DIR/df.csv --extractor mobilenetv2_100 --extractor-weights FILE

The teacher is a TokenSiamese with many tokens (--teacher-grid squared for each of three depths); the student is the
default TokenSiamese. Both train with default settings on the train split, the student a second time with the teacher's
logits of its mined lists. Gains are those of the pairwise step alone on the validation split; in the rows `theirs` is
the teacher unless they say otherwise. Rates are pairs/s of `forward` with one thread, encodings at hand.
"""

import argparse
import logging
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _catalogue import add_catalogue_flags, extractor_of, generate_quick_catalogue, parse_with_catalogue
from _measuring import Row, add_common_flags, compared, describe_machine, finish, rate, say

from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig
from distributed_rerank.config.pairwise import TokenSiameseConfig
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.extraction import embed
from distributed_rerank.models.saving import load_model
from distributed_rerank.scoring.plan import pairs_per_batch
from distributed_rerank.training.distillation import TableTeacher, Teacher, read_teacher
from distributed_rerank.training.stage import train

METRICS = ("map@10", "cmc@1")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Result:
    """A trained model on the validation split."""

    first_stage: dict[str, float]
    reranked: dict[str, float]
    seconds: float

    def gain(self, key: str) -> float:
        """Points over the first stage."""
        return 100 * (self.reranked[key] - self.first_stage[key])


class Trial:
    """A catalogue with embeddings, on which models are trained and measured."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.work = work
        self.extractor = extractor_of(arguments)
        self.config = TrainingConfig(n_items=arguments.n_items, top_n=arguments.n_items)
        if arguments.quick:
            self.config = replace(self.config, epochs=1, steps_per_epoch=5)
        training, validation = (read_catalogue(arguments.catalogue, purpose=p) for p in ("training", "evaluation"))
        self.training = first_labels(training.restrict("train"), arguments.labels)
        self.validation = first_labels(validation.restrict("validation"), arguments.labels)
        embed(self.validation, self.extractor, work / "embeddings")

    def run(self, name: str, shape: dict[str, Any], teacher: Teacher | TableTeacher | None = None) -> Result:
        """Trains a TokenSiamese of this shape and measures its pairwise step."""
        started = time.perf_counter()
        chain = train(
            self.training, TokenSiameseConfig(extractor=self.extractor, **shape), self.config, self.work / name,
            embeddings_folder=self.work / "train-embeddings", teacher=teacher,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        steps = Chain(() if chain.pairwise is None else (chain.pairwise,))
        config = FirstStageConfig(embeddings=self.work / "embeddings")
        out, model = self.work / f"{name}-evaluation", load_model(self.work / name)
        found = evaluate(self.validation, config, out, model=model, chain=steps, measure=MeasureConfig(baselines=False))
        result = Result(found["first_stage"], found.get("reranked", found["first_stage"]), seconds)
        say(f"{name}: {', '.join(f'{key} {result.gain(key):+.2f}' for key in METRICS)}, {seconds:.0f} s")
        return result

    def pairs_per_second(self, name: str, seconds: float) -> float:
        """Rate of `forward` with one thread, in the micro-batches of the scoring stage."""
        model = load_model(self.work / name).prepare_for_inference(CPU)
        batch = pairs_per_batch(model.gflop_per_pair(), is_gpu=False)
        generator = torch.Generator().manual_seed(0)
        encoded = torch.randn(2, batch, *model.encoding_shape, generator=generator).to(model.encoding_dtype)
        distance = torch.rand(batch, generator=generator)
        with torch.inference_mode():
            return rate(lambda: len(model(encoded[0], encoded[1], distance)), seconds, CPU)


def first_labels(catalogue: Catalogue, number: int | None) -> Catalogue:
    """The images of the first so many labels; None = all."""
    return catalogue if number is None else catalogue.take(np.flatnonzero(catalogue.labels < number))


def rows_of(trial: Trial, arguments: argparse.Namespace) -> list[Row]:
    """The three trainings and what they come to."""
    shape = {"grid": arguments.teacher_grid, "depths": (-3, -2, -1), "token_dim": 128}
    teacher = trial.run("teacher", shape)
    plain = trial.run("student", {})
    taught = trial.run("distilled", {}, read_teacher(trial.work / "teacher"))
    rows = []
    for key in METRICS:
        for name, result in (("student without teacher", plain), ("distilled student", taught)):
            ratio = result.gain(key) / teacher.gain(key) if teacher.gain(key) else None
            rows.append(Row(f"{name}: {key} gain", "points", result.gain(key), teacher.gain(key), ratio))
    # In turns, so that both meet the same load.
    rounds, seconds = (1, 0.2) if arguments.quick else (5, 2.0)
    rates = [[trial.pairs_per_second(name, seconds) for name in ("distilled", "teacher")] for _ in range(rounds)]
    rows.append(compared("distilled student", "pairs/s", *zip(*rates, strict=True)))
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    add_catalogue_flags(parser)
    parser.add_argument("--labels", type=int, help="take the first so many labels of either split; default: all")
    parser.add_argument("--n-items", type=int, default=50, help="candidates that are trained on and re-ranked")
    parser.add_argument("--teacher-grid", type=int, default=16)
    return parse_with_catalogue(parser)


def main() -> None:
    arguments = parse()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    say(describe_machine())
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.out or Path(temporary)
        if arguments.quick:
            generate_quick_catalogue(arguments, work)
            arguments.teacher_grid = 8
        finish(rows_of(Trial(arguments, work), arguments), arguments.json)


if __name__ == "__main__":
    main()
