"""A served model under load: requests, errors, latency, with one replica killed in the middle.

    python benchmarks/serve.py --photos FOLDER [--weights FILE] [--requests 10000] [--clients 8] [--json FILE]

The model is that of online.py, with two replicas on Ray Serve and a token; a request has a cached query and 50 cached
candidates. Every answer is compared with that of `Reranker.rank`. One replica gets SIGKILL half way, or several on the
way (--kills). Needs the extra `serve`.
"""

import argparse
import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pandas as pd
from _measuring import Row, add_common_flags, describe_machine, finish, photos_in, say
from online import make_model

from distributed_rerank import Reranker

Answer = tuple[float, int, Any]
"""Seconds, status, results."""


def start(folder: Path, arguments: argparse.Namespace, token: str) -> tuple[subprocess.Popen[bytes], str]:
    """The service and its address, once it listens."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "distributed_rerank", "serve", str(folder / "model"), "--port", "0"]
    command += ["--catalogue", str(folder / "photos.csv"), "--cache", str(folder / "cache")]
    command += ["--num-workers", str(arguments.replicas)]
    environment = {**os.environ, "DISTRIBUTED_RERANK_TOKEN": token, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    while not (found := re.search(r"serving (http://\S+),", log.read_text())):
        if process.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(0.2)
    return process, found[1]


def replica_below(pid: int) -> int:
    """A replica among the processes that `pid` started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica:" not in (folder / "cmdline").read_bytes():
                continue
            parent = int(folder.name)
            while parent not in (0, pid):
                parent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            return int(folder.name)
    sys.exit("no replica was found")


async def load(
    address: str, bodies: list[dict[str, Any]], arguments: argparse.Namespace, token: str, pid: int
) -> tuple[list[Answer], float]:
    """Every request by one of the clients, each with one at a time; and the seconds of all."""
    answers: list[Answer] = []
    numbers = iter(range(arguments.requests))
    killed = {(n + 1) * arguments.requests // (arguments.kills + 1) for n in range(arguments.kills)}

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            if number in killed:
                os.kill(replica_below(pid), signal.SIGKILL)
            began = time.perf_counter()
            async with session.post(address, json=bodies[number % len(bodies)]) as answer:
                content = await answer.json()
            answers.append((time.perf_counter() - began, answer.status, content.get("results", number)))

    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(arguments.clients)))
        return answers, time.perf_counter() - began


def expected_of(model: Path, cache: Path, bodies: list[dict[str, Any]]) -> list[list[tuple[int, float, float]]]:
    """The results of each body by `Reranker.rank`."""
    with Reranker.from_pretrained(model, cache=cache) as reranker:
        found = []
        for body in bodies:
            matches = reranker.rank(reranker.cached(body["query"]), body["documents"], body["distances"], None)
            places = {id: place for place, id in enumerate(body["documents"])}
            found.append([(places[match.id], match.probability or 0.0, match.distance) for match in matches])
        return found


def rows_of(folder: Path, photos: list[Path], arguments: argparse.Namespace) -> list[Row]:
    rng, token = np.random.default_rng(0), secrets.token_hex(16)
    ids = [str(number) for number in range(len(photos))]
    pd.DataFrame({"id": ids, "path": [str(photo.absolute()) for photo in photos]}).to_csv(folder / "photos.csv")
    bodies = [
        {
            "query": str(number),
            "documents": rng.choice(ids, arguments.candidates, replace=False).tolist(),
            "distances": np.sort(rng.random(arguments.candidates)).tolist(),
        }
        for number in range(min(50, len(photos)))
    ]
    process, address = start(folder, arguments, token)
    try:
        answers, seconds = asyncio.run(load(address, bodies, arguments, token, process.pid))
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
    retried = (folder / "serve.log").read_text().count("a replica died under a request")
    known = {tuple(result) for result in map(tuple, expected_of(folder / "model", folder / "cache", bodies))}
    wrong = sum(
        status == 200 and tuple((row["index"], row["relevance_score"], row["distance"]) for row in results) not in known
        for _, status, results in answers
    )
    times = 1000 * np.array([taken for taken, _, _ in answers])
    return [
        Row("requests", "requests", float(len(answers))),
        Row("without an answer of 200", "requests", float(sum(status != 200 for _, status, _ in answers))),
        Row("answers unlike Reranker.rank's", "requests", float(wrong)),
        Row("replicas killed", "replicas", float(arguments.kills)),
        Row("asked again as their replica was killed", "requests", float(retried)),
        Row("rate", "requests/s", len(answers) / seconds),
        Row("p50", "ms", float(np.percentile(times, 50))),
        Row("p99", "ms", float(np.percentile(times, 99))),
        Row("slowest", "ms", float(times.max())),
        Row("exit code after Ctrl-C", "", float(code)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--photos", type=Path, required=True, help="folder with at least 64 JPEG files, at any depth")
    parser.add_argument("--weights", help="of the network; default: untrained, which changes no cost")
    parser.add_argument("--cnn", default="mobilenetv2_100")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8, help="requests under way at a time")
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cnn, arguments.size, arguments.requests = "test_resnet", 64, 100
    print(describe_machine(), flush=True)
    photos = photos_in(arguments.photos, max(64, arguments.candidates), every=1 if arguments.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        say(f"{len(photos)} photos, process {os.getpid()}")
        (Path(folder) / "model").mkdir()
        make_model(Path(folder) / "model", photos, arguments)
        finish(rows_of(Path(folder), photos, arguments), arguments.json)


if __name__ == "__main__":
    main()
