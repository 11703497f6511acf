"""docs/cluster.md and README.md: what they submit, executed on a cluster with a token and an S3 server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from job_files import EXTRACTOR, bytes_of
from ray_head import started_head
from s3_server import ENVIRONMENT, Server, put_folder

from distributed_rerank import command_line
from distributed_rerank.data.remote_folders import fetch

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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(560)
def test_submitted_commands_run_on_a_cluster_and_give_the_bytes_of_a_local_run(
    s3: Server, catalogue_path: Path, run_job, tmp_path: Path
) -> None:
    put_folder(catalogue_path.parent, f"{s3.bucket}/photos")
    bucket = {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3.address}
    program = f"{sys.executable} -m distributed_rerank"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with started_head(**bucket, PYTHONPATH=paths, HOME=str(tmp_path / "head")) as head:
        script = "".join(SUBMITTED).replace("s3://my-bucket", s3.bucket).replace("distributed-rerank ", f"{program} ")
        script = script.replace("--extractor vit_small_patch16_224.dino", " ".join(EXTRACTOR))
        script = script.replace("$EXTRACTOR", " ".join(EXTRACTOR)).replace("--driver-gpus", "--driver-cpus")
        script = script.replace("train --num-workers 0", f"train --num-workers 0 {SMALLER}")
        script = script.replace("--submission-id", f"--address {head.address} --submission-id")
        base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            ["bash", "-e"], input=script, env={**base, **head.environment, "PYTHONPATH": paths}, cwd=tmp_path,
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "night-1 is known to the cluster (SUCCEEDED): attached" in done.stderr
    given = ["--catalogue", f"{s3.bucket}/photos/df.csv"]
    assert run_job("embed", *given, "--out", tmp_path / "embeddings", *EXTRACTOR).code == 0
    assert run_job("evaluate", *given, "--embeddings", tmp_path / "embeddings", "--out", tmp_path / "local").code == 0
    report = set(bytes_of(fetch(f"{s3.bucket}/runs/report", tmp_path / "report")))
    assert report == {*bytes_of(tmp_path / "local"), "reranked.parquet"}, "with a model there are re-ranked lists"
    found = fetch(f"{s3.bucket}/runs/evaluation", tmp_path / "fetched")
    assert bytes_of(found) == bytes_of(tmp_path / "local")
    history = pd.read_parquet(fetch(f"{s3.bucket}/nightly/history.parquet", tmp_path / "history.parquet"))
    assert history["run_id"].tolist() == ["1"]
    left = {path.name for path in tmp_path.iterdir()} - {
        "head",
        "embeddings",
        "local",
        "fetched",
        "report",
        "history.parquet",
    }
    assert left == set(), "no path outside the bucket and the head's scratch"
