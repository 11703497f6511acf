"""How time and peak memory grow with queries, images, top_n and workers, and what exact search can hold.

    python benchmarks/scale.py [--parts driver-memory logits score workers ...] [--quick] [--json FILE]

Each point is a process of its own, so that its peak memory is its own. Time is that of the stage, from image files to
its finished folder, without the start of Python. `ours` is the larger point, `theirs` the smaller one it is held
against.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from _measuring import Child, Row, add_common_flags, against, describe_machine, finish, run_child

from distributed_rerank.tensors.hardware import bf16_support

HERE = Path(__file__).resolve().parent


def point(kind: str, **size: Any) -> Child:
    """Run one point and print what it took."""
    command = [sys.executable, HERE / "_points.py", kind, json.dumps(size)]
    child = run_child(command, environment={"OMP_NUM_THREADS": str(size.get("threads", 1))})
    memory = child.answer.get("tree_mb", child.peak_mb) if size.get("workers") else child.peak_mb
    print(f"{kind} {size}: {child.answer['seconds']:.2f} s, peak {memory:.0f} MB", flush=True)
    return Child(child.answer, memory, child.seconds)


def growth(name: str, small: Child, large: Child, unit: str) -> list[Row]:
    """Time and memory of a point and of one that has four times the work."""
    seconds = [child.answer["seconds"] for child in (large, small)]
    memory = [child.peak_mb for child in (large, small)]
    return [
        against(f"{name} x 4: time", "s", *seconds),
        against(f"{name} x 4: peak memory", "MB", *memory),
        Row(f"{name}: rate of the larger", unit, large.answer[unit.partition("/")[0]] / seconds[0]),
    ]


def score_rows(is_quick: bool) -> list[Row]:
    """Growth in one process."""
    model = {"name": "vit_tiny_patch16_224", "size": 32} if is_quick else {"name": "vit_small_patch16_224", "size": 224}
    n_queries, n_images, top_n = (4, 24, 4) if is_quick else (32, 160, 32)
    base = {"n_queries": n_queries, "n_images": n_images, "top_n": top_n, **model}
    small = point("score", **base)
    middle = point("score", **{**base, "n_queries": 2 * n_queries})
    large = point("score", **{**base, "n_queries": 4 * n_queries, "is_measured": True})
    deep = point("score", **{**base, "top_n": 4 * top_n})
    rows = growth("queries", small, large, "pairs/s")
    rows += [row for row in growth("top_n", small, deep, "pairs/s") if "rate" not in row.name]
    seconds = [child.answer["seconds"] for child in (middle, small)]
    rows.append(against("queries x 2: time", "s", *seconds))
    rows += decoded_rows(large)
    # Encodings of the smaller point just fit in the budget, so the larger one has to work in rounds.
    budget = {"encoding_gb": n_images * 3 * model["size"] ** 2 / 1e9}
    few, many = (point("score", **{**base, "n_images": factor * n_images, **budget}) for factor in (1, 4))
    memory = [child.peak_mb for child in (many, few)]
    rows.append(against("images x 4 at one memory budget: peak memory", "MB", *memory))
    return rows


def decoded_rows(scored: Child) -> list[Row]:
    """What is done once however many pairs and however many n there are."""
    answer = scored.answer
    decoded, unique = answer["images_decoded"], answer["unique"]
    largest, every = (answer["seconds"] + answer[name] for name in ("largest_s", "every_s"))
    return [
        against("images decoded against distinct images", "images", decoded, unique),
        against("one scoring pass: metrics for every n against the largest n alone", "s", every, largest),
    ]


def worker_rows(is_quick: bool) -> list[Row]:
    """Ray against a bare loop over the same blocks, and 2 workers against 1."""
    model = {"name": "vit_tiny_patch16_224", "size": 32} if is_quick else {"name": "vit_small_patch16_224", "size": 224}
    # One and a half to two minutes on two cores.
    whole = (640, 640, 16) if bf16_support(torch.device("cpu")) == "AMX" else (160, 640, 10)
    n_queries, n_images, top_n = (8, 24, 4) if is_quick else whole
    size = {"n_queries": n_queries, "n_images": n_images, "top_n": top_n, **model}
    bare = point("bare_loop", threads=2, **size)
    on_ray = {workers: point("score", workers=workers, **size) for workers in ((2,) if is_quick else (1, 2, 4))}
    rates = {workers: child.answer["pairs"] / child.answer["seconds"] for workers, child in on_ray.items()}
    loop = bare.answer["pairs"] / bare.answer["seconds"]
    rows = [
        Row(
            "evaluator on Ray, 2 workers, against a bare loop with 2 threads",
            "pairs/s",
            rates[2],
            loop,
            rates[2] / loop,
        ),
        Row("evaluator on Ray, 2 workers: peak memory with Ray's own processes", "MB", on_ray[2].peak_mb),
    ]
    if 1 in rates:
        rows.append(against("2 workers against 1", "pairs/s", rates[2], rates[1]))
        rows.append(against("4 workers against 2, on 2 cores", "pairs/s", rates[4], rates[2]))
    return rows


def search_rows(is_quick: bool) -> list[Row]:
    """Exact search, one thread; 100 neighbours, 384 dimensions."""
    n_queries, n_gallery = (512, 4096) if is_quick else (2048, 50_000)
    common = {"dim": 32 if is_quick else 384, "n_items": 10 if is_quick else 100}
    small = point("search", n_queries=n_queries, n_gallery=n_gallery, **common)
    more = point("search", n_queries=4 * n_queries, n_gallery=n_gallery, **common)
    wider = point("search", n_queries=n_queries, n_gallery=4 * n_gallery, **common)
    rows = growth("search, queries", small, more, "queries/s") + growth("search, gallery", small, wider, "queries/s")
    whole = 20_000 if is_quick else 450_000
    part = point("search", n_queries=n_queries, n_gallery=whole, is_one_set=True, **common)
    hours = part.answer["seconds"] * whole / n_queries / 3600
    name = f"search {whole:,} x {whole:,}, measured on {n_queries:,} queries"
    rows += [Row(f"{name}: time of all", "core hours", hours), Row(f"{name}: peak memory", "MB", part.peak_mb)]
    if not is_quick:
        big = point("search", n_queries=10_000, n_gallery=1_000_000, **common)
        rows.append(Row("search 10,000 x 1,000,000 x 384", "s", big.answer["seconds"]))
        rows.append(Row("search 10,000 x 1,000,000 x 384: peak memory", "MB", big.peak_mb))
    return rows


def mining_rows(is_quick: bool) -> list[Row]:
    """Mining a whole training set: exact search, figures and the draws of one epoch; 50 candidates each."""
    n_images = 2000 if is_quick else 60_000
    size = {"n_images": n_images, "dim": 32 if is_quick else 384, "n_items": 50, "n_labels": n_images // 20}
    ways = {"one process, 1 thread": {"threads": 1}} | ({} if is_quick else {"2 Ray workers": {"workers": 2}})
    rows = []
    for way, given in ways.items():
        child = point("mine", **size, **given)
        name = f"mining {n_images:,} x {n_images:,} x {size['dim']}, {way}"
        rows += [Row(f"{name}: time", "s", child.answer["seconds"]), Row(f"{name}: peak memory", "MB", child.peak_mb)]
        rows.append(Row(f"{name}: exact search alone", "s", child.answer["search_s"]))
    return rows


def evaluation_rows(is_quick: bool) -> list[Row]:
    """Figures of lists that are there already: no image is read."""
    small, depth = (1000, 20) if is_quick else (100_000, 100)
    large = 4 * small if is_quick else 10 * small
    few, many = (point("evaluate_lists", n_queries=n_queries, depth=depth) for n_queries in (small, large))
    name = f"evaluation of given lists, from their file to the report, {large:,} x {depth} against {small:,} x {depth}"
    return [
        against(f"{name}: time", "s", many.answer["seconds"], few.answer["seconds"]),
        against(f"{name}: peak memory", "MB", many.peak_mb, few.peak_mb),
    ]


def memory_rows(is_quick: bool) -> list[Row]:
    """The driver's memory from a table to the report, and how it grows beyond what it holds of the catalogue."""
    sizes = (2_000, 8_000) if is_quick else (100_000, 1_000_000, 4_000_000)
    children = [point("driver_memory", n_images=n_images, n_queries=min(1000, n_images)) for n_images in sizes]
    rows = []
    for n_images, child in zip(sizes, children, strict=True):
        for name in ("held", "catalogue", "embed", "evaluate", "score_plan"):
            rows.append(Row(f"driver, {n_images:,} images: {name}", "MB", child.answer[f"{name}_mb"]))
    first, last = children[0].answer, children[-1].answer
    for name in ("embed", "evaluate", "score_plan"):
        grown = [answer[f"{name}_mb"] - answer["held_mb"] for answer in (first, last)]
        each = (grown[1] - grown[0]) * 1e6 / (sizes[-1] - sizes[0])
        rows.append(Row(f"driver: growth of {name} beyond the catalogue", "bytes an image", each))
    return rows


def logit_rows(is_quick: bool) -> list[Row]:
    """Lists and logits in files to metrics: 10^8 pairs against a quarter of them."""
    sizes, depth = ((1000, 4000), 20) if is_quick else ((250_000, 1_000_000), 100)
    few, many = (point("evaluate_logits", n_queries=n_queries, depth=depth) for n_queries in sizes)
    return growth("logits", few, many, "queries/s")


PARTS = {
    "driver-memory": memory_rows,
    "logits": logit_rows,
    "score": score_rows,
    "workers": worker_rows,
    "search": search_rows,
    "mining": mining_rows,
    "evaluation": evaluation_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    arguments = parser.parse_args()
    print(describe_machine(), flush=True)
    rows = [row for part in arguments.parts for row in PARTS[part](arguments.quick)]
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
