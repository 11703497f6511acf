"""docs/cluster.md and README.md: what they submit, executed on three nodes with a token and an S3 server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from job_files import EXTRACTOR, SMALL_BLOCKS, bytes_of
from ray_head import Head, ask, started_head
from s3_server import ENVIRONMENT, Server, put_folder

from distributed_rerank import command_line
from distributed_rerank.storage.remote_folders import fetch

ROOT = Path(__file__).resolve().parents[2]
GUIDE, README = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/cluster.md", "README.md"))
SUBMITTED = [
    re.sub(r"^ray .*\n", "", block, flags=re.MULTILINE)
    for text in (GUIDE, README)
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    if "distributed-rerank submit" in block
]
"""The blocks of the guide, then that of README, without what starts a cluster."""
SMALLER = "--epochs 1 --steps-per-epoch 2 --lists-per-step 4 --n-negatives 2 --n-items 8 --top-n 4"


def commands() -> list[str]:
    """All that is submitted, continued lines joined."""
    return re.findall(r"^(distributed-rerank .*)$", "".join(SUBMITTED).replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("command", commands())
def test_every_command_is_read_by_the_jobs(command: str) -> None:
    outer = command_line.parse("submit", command.replace("$EXTRACTOR", "").split()[2:])
    assert outer.command[0] == "distributed-rerank"
    assert command_line.parse(outer.command[1], outer.command[2:]).catalogue == "s3://my-bucket/photos/df.csv"


def test_table_of_values_names_every_file_and_counts_add_up() -> None:
    for file in ("cluster.yaml", "deploy/gcp.yaml", "deploy/on_premise.yaml", "deploy/kuberay.yaml"):
        assert f"`{file}`" in GUIDE
        assert (ROOT / file).is_file()


def nodes_that_worked(head: Head) -> dict[str, set[str]]:
    """By submission id of each job: the nodes on which workers finished a piece of its work."""
    tasks = ask(head.address, head.environment, "/api/v0/tasks?limit=10000")["data"]["result"]["result"]
    jobs = {job["job_id"]: job["submission_id"] for job in ask(head.address, head.environment, "/api/jobs/")}
    found: dict[str, set[str]] = {name: set() for name in jobs.values()}
    for task in tasks:
        if task["state"] == "FINISHED" and ("_Host.call" in task["name"] or "_decode_and_embed" in task["name"]):
            found[jobs[task["job_id"]]].add(task["node_id"])
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(560)
def test_submitted_commands_run_on_three_nodes_and_give_the_bytes_of_a_local_run(
    s3: Server, catalogue_path: Path, run_job, tmp_path: Path
) -> None:
    put_folder(catalogue_path.parent, f"{s3.bucket}/photos")
    bucket = {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3.address}
    program = f"{sys.executable} -m distributed_rerank"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    extractor = " ".join([*EXTRACTOR, *SMALL_BLOCKS])
    with started_head(2, tmp_path / "homes", **bucket, PYTHONPATH=paths) as head:
        script = "".join(SUBMITTED).replace("s3://my-bucket", s3.bucket).replace("distributed-rerank ", f"{program} ")
        script = script.replace("--extractor vit_small_patch16_224.dino", extractor)
        script = script.replace("$EXTRACTOR", extractor).replace("--driver-gpus", "--driver-cpus")
        script = script.replace("train --num-workers 0", f"train --num-workers 0 {SMALLER}")
        script = script.replace("--submission-id", f"--address {head.address} --submission-id")
        base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            ["bash", "-e"], input=script, env={**base, **head.environment, "PYTHONPATH": paths}, cwd=tmp_path,
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        worked = nodes_that_worked(head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("embed", "evaluation"):
        assert len(worked[name]) == 2, f"both nodes beside the head work: {worked}"
    assert "night-1 is known to the cluster (SUCCEEDED): attached" in done.stderr
    here, there = tmp_path / "here", tmp_path / "there"
    given, small = ["--catalogue", f"{s3.bucket}/photos/df.csv"], [*EXTRACTOR, *SMALL_BLOCKS]
    own = ["--embeddings", here / "embeddings"]
    assert run_job("embed", *given, "--out", here / "embeddings", *small).code == 0
    assert run_job("train", *given, "--out", here / "model", *own, *small, *SMALLER.split()).code == 0
    assert run_job("evaluate", *given, "--out", here / "evaluation", *own).code == 0
    assert run_job("evaluate", *given, "--out", here / "report", *small, "--model", here / "model").code == 0
    for file in ("embeddings/embeddings.parquet", "model/model.safetensors", "model/chain.json"):
        assert fetch(f"{s3.bucket}/runs/{file}", there / file).read_bytes() == (here / file).read_bytes(), file
    pairs = {"runs/evaluation": "evaluation", "runs/report": "report", "nightly/runs/1": "evaluation"}
    for where, folder in pairs.items():
        assert bytes_of(fetch(f"{s3.bucket}/{where}", there / where)) == bytes_of(here / folder), where
    assert "reranked.parquet" in bytes_of(here / "report"), "with a model there are re-ranked lists"
    history = pd.read_parquet(fetch(f"{s3.bucket}/nightly/history.parquet", there / "history.parquet"))
    assert history["run_id"].tolist() == ["1"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"homes", "here", "there"}, "no path beside the bucket"
    homes = [path for node in (tmp_path / "homes").iterdir() for path in (*node.glob("*"), *node.glob("*/*"))]
    found = {"/".join(path.relative_to(tmp_path / "homes").parts[1:]) for path in homes}
    assert found == {".cache", ".cache/distributed_rerank"}, "and the nodes' scratch"
