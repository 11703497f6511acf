"""What one pair costs with each pairwise model: pairs/s, share of the matmul peak, GFLOP per pair, bytes per image.

    python benchmarks/pairs.py [--models concat ...] [--precisions fp32 bf16] [--runtimes compiled openvino] [--quick]

Encodings are cached and already on the device, weights are untrained: neither changes the cost. On a GPU one process
measures; on a CPU --processes of --threads threads each work at the same time, as Ray's workers do, and their rates
are added. The peak is that of square matrix products in the same format and processes, measured in the same run.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measuring import Row, add_common_flags, describe_machine, finish, matmul_peak, rate, run_child, say, synchronise
from _runtimes import RUNTIMES, forward_of

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import (
    ConcatSiameseConfig,
    DistanceSiameseConfig,
    SplitSiameseConfig,
    TokenSiameseConfig,
)
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.split_siamese import SplitSiamese
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.runtime.devices import array_of, keep_freed_memory, pick_device
from distributed_rerank.scoring import plan as scoring_plan
from distributed_rerank.scoring.rounds import PairTask
from distributed_rerank.scoring.score import Scorer
from distributed_rerank.tensors.hardware import bf16_support

MODELS = ("concat", "split-8", "split-10", "token", "distance")
PAIRS_OF_A_QUERY = 50
CALLS = 8
"""Calls of the model between two looks at the clock."""


def build(name: str, precision: Any, arguments: argparse.Namespace) -> PairwiseModel:
    """An untrained pairwise model; `split-8` splits at block 8."""

    def extractor(timm_name: str, size: int) -> ExtractorConfig:
        return ExtractorConfig(name=timm_name, weights="none", image_size=size, precision=precision)

    vit, cnn = extractor(arguments.vit, arguments.vit_size), extractor(arguments.cnn, arguments.cnn_size)
    if name == "concat":
        return ConcatSiamese(ConcatSiameseConfig(extractor=vit))
    if name.startswith("split-"):
        return SplitSiamese(SplitSiameseConfig(extractor=vit, split_at=int(name.removeprefix("split-"))))
    if name == "token":
        return TokenSiamese(TokenSiameseConfig(extractor=cnn))
    assert name == "distance", f"no model {name!r}"
    return DistanceSiamese(DistanceSiameseConfig(extractor=cnn))


def measure_model(name: str, precision: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Rates of one process: encoding, the model alone, and the whole scorer with its gathers and copies."""
    device, seconds = pick_device(), arguments.seconds
    model = build(name, precision, arguments)
    gflop, n_bytes = model.gflop_per_pair(), model.bytes_per_image
    batch = arguments.batch or scoring_plan.pairs_per_batch(gflop, device.type == "cuda")
    model.prepare_for_inference(device)
    generator = torch.Generator().manual_seed(0)
    n_images = 16 if device.type == "cpu" else 256
    pixels = torch.randint(256, (n_images, 3, *model.transform.size), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        encoded = torch.cat([model.encode(part.to(device)) for part in pixels.split(16)])
        places = torch.randint(n_images, (2, CALLS, batch), generator=generator).to(device)
        distances = torch.rand(batch, generator=generator).to(device)
        forward = torch.compile(model, dynamic=False) if device.type == "cuda" and arguments.compile else model

        def some_images() -> int:
            model.encode(pixels[:16].to(device))
            return 16

        def some_pairs() -> int:
            for query, candidate in places.unbind(1):
                forward(encoded[query], encoded[candidate], distances)
            return CALLS * batch

        some_pairs()
        synchronise(device)
        wait_for_others(arguments, f"{name}-{precision}")
        found = {
            "encode_images_per_s": rate(some_images, seconds, device),
            "pairs_per_s": rate(some_pairs, seconds, device),
        }
    block = PAIRS_OF_A_QUERY * scoring_plan.queries_per_block(PAIRS_OF_A_QUERY, gflop)
    # A block of the usual size, unless this machine would need longer for it than a measurement lasts.
    n_pairs = max(batch, min(block, int(found["pairs_per_s"] * seconds)))
    for runtime in arguments.runtimes:
        found |= measure_runtime(runtime, name, precision, encoded, places, distances, arguments)
    found["scorer_pairs_per_s"] = measure_scorer(model, encoded, n_pairs, arguments)
    return {"gflop_per_pair": gflop, "bytes_per_image": n_bytes, "batch": batch, **found}


def measure_runtime(
    runtime: str,
    name: str,
    precision: str,
    encoded: torch.Tensor,
    places: torch.Tensor,
    distances: torch.Tensor,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Rate of `forward` by another runtime on a CPU, and its largest error against float32 by torch."""
    untrained = build(name, "fp32", arguments)
    example = (encoded[places[0, 0]], encoded[places[1, 0]], distances)
    forward = forward_of(runtime, untrained, precision, arguments.threads, example)
    with torch.inference_mode():
        exact = untrained(*example)
        error = float((forward(*example).float() - exact).abs().max() / exact.std())

        def some_pairs() -> int:
            for query, candidate in places.unbind(1):
                forward(encoded[query], encoded[candidate], distances)
            return CALLS * len(distances)

        some_pairs()
        wait_for_others(arguments, f"{name}-{precision}-{runtime}")
        return {
            f"{runtime}_pairs_per_s": rate(some_pairs, arguments.seconds, encoded.device),
            f"{runtime}_error": error,
        }


def measure_scorer(model: PairwiseModel, encoded: torch.Tensor, n_pairs: int, arguments: argparse.Namespace) -> float:
    """Pairs per second of scoring.score.Scorer on blocks of `n_pairs`, encodings given as arrays."""
    work = WorkConfig(threads_per_worker=arguments.threads, pairs_per_batch=arguments.batch)
    scorer = Scorer(model, work)
    array, rng = array_of(encoded), np.random.default_rng(0)
    query, candidate = rng.integers(len(array), size=(2, n_pairs))
    task = PairTask(query, candidate, np.ones(n_pairs, np.float32))
    first_rows = np.zeros(1, np.int64)
    tasks = [task] * work.score_blocks_per_call(scorer.device.type == "cuda")
    return rate(lambda: sum(map(len, scorer.score(tasks, first_rows, array).logits)), arguments.seconds, encoded.device)


def wait_for_others(arguments: argparse.Namespace, name: str) -> None:
    """Returns when all processes have come here, so that they are measured while all of them work."""
    if arguments.meet is None:
        return
    folder = Path(arguments.meet) / name
    folder.mkdir(exist_ok=True)
    (folder / str(arguments.number)).touch()
    while len(list(folder.iterdir())) < arguments.processes:
        time.sleep(0.02)


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All that one process measures: `<model> <precision>` -> figures, with `matmul <precision>` among them."""
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    found: dict[str, dict[str, float]] = {}
    for precision in arguments.precisions:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        wait_for_others(arguments, f"matmul-{precision}")
        found[f"matmul {precision}"] = {"flop_per_s": matmul_peak(dtype, pick_device(), 2 * arguments.seconds)}
        for model in arguments.models:
            found[f"{model} {precision}"] = measure_model(model, precision, arguments)
            say(f"{model}, {precision}: {found[f'{model} {precision}']}")
    return found


def together(arguments: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """What `--processes` processes say that measured the same at the same time."""
    if arguments.processes == 1:
        return [measure(arguments)]
    with tempfile.TemporaryDirectory() as meet, ThreadPoolExecutor(arguments.processes) as pool:
        command = [sys.executable, __file__, *sys.argv[1:], "--meet", meet]
        environment = {"OMP_NUM_THREADS": str(arguments.threads)}
        children = [
            pool.submit(run_child, [*command, "--number", str(number)], environment=environment)
            for number in range(arguments.processes)
        ]
        return [one.result().answer for one in children]


def rows_of(arguments: argparse.Namespace, answers: Sequence[dict[str, dict[str, float]]]) -> list[Row]:
    """All figures, model by model; rates are sums over the processes."""

    def total(key: str, figure: str) -> float:
        return sum(answer[key][figure] for answer in answers)

    rows: list[Row] = []
    for precision in arguments.precisions:
        peak = total(f"matmul {precision}", "flop_per_s")
        rows.append(Row(f"matmul peak, {precision}", "TFLOP/s", peak / 1e12))
        for model in arguments.models:
            key, name = f"{model} {precision}", f"{model}, {precision}"
            first, pairs = answers[0][key], total(key, "pairs_per_s")
            rows += [
                Row(f"{name}: forward", "pairs/s", pairs),
                Row(f"{name}: share of the matmul peak", "share", pairs * first["gflop_per_pair"] * 1e9 / peak),
                Row(f"{name}: forward through the scorer", "pairs/s", total(key, "scorer_pairs_per_s")),
            ]
            for runtime in arguments.runtimes:
                rated = total(key, f"{runtime}_pairs_per_s")
                rows.append(Row(f"{name}: forward, {runtime}", "pairs/s", rated, pairs, rated / pairs))
                rows.append(Row(f"{name}: largest error, {runtime}", "deviations", first[f"{runtime}_error"]))
            if model != "concat":  # whose encodings are the pixels as they come
                rows.append(Row(f"{name}: encode", "images/s", total(key, "encode_images_per_s")))
            if model != "concat" and "concat" in arguments.models:
                base = total(f"concat {precision}", "pairs_per_s")
                rows.append(Row(f"{name}: against concat", "pairs/s", pairs, base, pairs / base))
    for model in arguments.models:
        first = answers[0][f"{model} {arguments.precisions[0]}"]
        rows.append(Row(f"{model}: cost", "GFLOP/pair", first["gflop_per_pair"]))
        rows.append(Row(f"{model}: encoding", "bytes/image", first["bytes_per_image"]))
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--models", nargs="+", default=MODELS, help="concat, split-<block>, token, distance")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), help="default: what this device computes in"
    )
    parser.add_argument("--seconds", type=float, help="of each measurement; default 10")
    parser.add_argument("--processes", type=int, help="that work at the same time; default 2 on a CPU, 1 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--batch", type=int, help="pairs in a call of the model; default: what the scorer takes")
    parser.add_argument("--compile", action="store_true", help="on a GPU: torch.compile the model, static shapes")
    parser.add_argument(
        "--runtimes", nargs="*", choices=RUNTIMES, default=(), help="on a CPU: other ways to run forward"
    )
    parser.add_argument("--vit", help="backbone of concat and split; default ViT-S/16 at 224 pixels")
    parser.add_argument("--vit-size", type=int)
    parser.add_argument("--cnn", default="mobilenetv2_100", help="backbone of token and distance")
    parser.add_argument("--cnn-size", type=int, help="default 160 pixels")
    for name in ("--meet", "--number"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quick, device = arguments.quick, pick_device()
    defaults = {
        "seconds": 0.2 if quick else 10.0,
        "vit": "vit_tiny_patch16_224" if quick else "vit_small_patch16_224",
        "vit_size": 32 if quick else 224,
        "cnn_size": 64 if quick else 160,
        "processes": 1 if device.type == "cuda" or quick else 2,
        "precisions": ["fp32", "bf16"] if bf16_support(device) else ["fp32"],
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.meet:
        print(json.dumps(measure(arguments)))
        return
    print(describe_machine(), flush=True)
    finish(rows_of(arguments, together(arguments)), arguments.json)


if __name__ == "__main__":
    main()
