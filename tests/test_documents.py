"""README.md, CONTRIBUTING.md and docs/*.md: every command is executed, in order, or is on a list that says why not.

A reader's files are small ones here (`prepare`), and SMALLER makes each job quick. Nothing else is changed.
"""

import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path

import pandas as pd
import pytest
import timm
from jobs.conftest import environment_of_jobs
from ray_head import free_ports
from safetensors.torch import save_file

from distributed_rerank import command_line
from distributed_rerank.config.jobs import JOBS
from distributed_rerank.config.options import options_of
from distributed_rerank.config.pairwise import PAIRWISE_CONFIGS
from distributed_rerank.demo.catalogue import write_demo_catalogue

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

ELSEWHERE = {
    r"make (setup|demo|test-all|lint typecheck|docs)\b": ".ci/run",
    r"make (test|lint typecheck test)\b": ".ci/run",  # the same tests without the slow ones
    r"bash \.ci/run": ".github/workflows/ci.yml",
    r"(?s)(export RAY_AUTH_MODE|.*distributed-rerank submit)": "tests/jobs/test_cluster_guide.py",
}
"""Commands that another file of the repository executes."""
NOT_RUN = {
    r"make chaos": "takes 20 minutes; benchmarks/README.md has what it gave",
    r"\.venv/bin/pip install pre-commit": "changes the repository's hooks",
    r"aws s3 cp": "needs an account; the tests put the files into their own S3 server",
    r"ray get-auth-token|RAY_AUTH_MODE=token ray start": "writes into the home folder and takes fixed ports",
    r"ray (up|dashboard)": "needs a cloud; tests/test_cluster_yaml.py checks the files",
}
"""Commands that cannot run in a test, with the reason."""
PROGRAMS = {".", "export", "make", "bash", "curl", "ray", "aws", ".venv/bin/pip"}
"""What commands may begin with, beside `distributed-rerank`."""
SMALLER = {
    "train": "--num-workers 0 --steps-per-epoch 2 --lists-per-step 4 --n-negatives 2",
    **dict.fromkeys(("embed", "evaluate", "rerank", "scheduled-evaluation"), "--num-workers 0"),
    "serve": "--num-workers 0 --port $PORT",
}
"""What is added to a job's command line."""
REPLACED = {
    "--extractor mobilenetv2_100": "--extractor test_resnet --extractor-weights none --image-size 32",
    "127.0.0.1:8000": "127.0.0.1:$PORT",
    "vlm.csv": "runs/trec/first_stage.trec",
    'read_catalogue("photos.csv")': 'read_catalogue("out/demo/catalogue/df.csv")',
}
"""Text of the documents, and what stands for it here."""
BEFORE = {
    "curl ": "until curl -sf http://127.0.0.1:$PORT/health >health.json; do sleep 0.2; kill -0 $!; done",
    "distributed-rerank compare": (
        "distributed-rerank evaluate --catalogue photos.csv --out runs/other --model runs/model --chain replace"
        " --extractor test_resnet --extractor-weights none --image-size 32 --num-workers 0 --trec runs/trec"
        " && cp runs/trec/first_stage.trec theirs.trec"
    ),
}
"""What a reader has done before the command that begins so."""
NAMES = """
import pandas
from distributed_rerank import Reranker
ids = photos = pandas.read_csv("photos.csv")["path"].tolist()
ids_from_the_vector_database, distances = ids[1:11], [0.01 * place for place in range(10)]
found = pandas.read_parquet("out/own/reranked/reranked.parquet")
found = found.drop(columns="distance").rename(columns={"first_stage_distance": "distance"})
found[["query_id", "gallery_id", "distance"]].to_csv("lists.csv", index=False)
"""
"""Names that a Python block of README.md takes for granted."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    language: str
    code: str

    def commands(self) -> list[str]:
        """Its commands, continued lines joined, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [stripped for line in lines if (stripped := re.sub(r"\s+#\s.*$|^#.*$", "", line).strip())]


def blocks_of(path: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(path.name, language, code) for language, code in found]


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]
COMMANDS = [(block.document, command) for block in BLOCKS if block.language == "bash" for command in block.commands()]


def reason_not_to_run(command: str) -> str | None:
    """Where else the command is executed, or why it is not; None = it is executed here."""
    return next((reason for rule, reason in (ELSEWHERE | NOT_RUN).items() if re.match(rule, command)), None)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_stands_in_fenced_blocks_of_a_named_language(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert {block.language for block in blocks_of(path)} <= {"bash", "python", "text"}
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"^(\s{4}\S|```)", outside, re.MULTILINE), "indented code, or a fence that is not closed"


@pytest.mark.parametrize("rule", ELSEWHERE | NOT_RUN)
def test_rule_is_of_use_and_the_file_it_names_executes_the_command(rule: str) -> None:
    commands = [command for _, command in COMMANDS if re.match(rule, command)]
    assert commands, "no document has such a command: drop the rule"
    if rule in ELSEWHERE:
        text = (ROOT / ELSEWHERE[rule]).read_text(encoding="utf-8")
        words = {word for command in commands if command.startswith("make") for word in command.split()[1:]}
        assert all(re.search(rf"make .*\b{re.escape(word)}\b", text) for word in words - {"test"})
        assert commands[0].startswith("make") or shlex.split(commands[0])[-1].split("/")[-1] in text or "submit" in text


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=lambda value: value[:60])
def test_words_of_a_command_are_read_by_its_job(document: str, command: str) -> None:
    """Whether it is executed or not: the options are there."""
    words = [re.sub(r"^\$\w+$", "", word) for word in shlex.split(command.removesuffix("&"))]
    words = [word for word in words if word]
    if words[0] == "distributed-rerank":
        flags = {f"--{option.flag}" for option in options_of(command_line.job_type(words[1]))}
        end = words.index("--") if "--" in words else len(words)
        assert {word for word in words[2:end] if word.startswith("--")} <= flags | {"--help"}
    else:
        assert words[0] in PROGRAMS or "=" in words[0], f"{document} begins a command with {words[0]}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_that_a_page_names_are_there(path: Path) -> None:
    flags = {f"--{option.flag}" for name in JOBS for option in options_of(command_line.job_type(name))}
    flags |= {f"--{option.flag}" for config in PAIRWISE_CONFIGS.values() for option in options_of(config)}
    named = re.findall(
        r"`[^`\n]*?(--[a-z][a-z.-]+)", re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.S | re.M)
    )
    others = {"--help", "--help-all", "--filters.", "--no-baselines", "--check", "--quick", "--no-deps", "--target"}
    assert set(named) <= flags | others


def test_curves_are_those_of_the_tables() -> None:
    drawn = run_path(str(ROOT / "docs" / "curves.py"))["drawn"]
    text = (ROOT / "docs" / "worth.md").read_text(encoding="utf-8")
    pictures = drawn(text)
    assert {name: (ROOT / "docs" / "curves" / f"{name}.svg").read_text("utf-8") for name in pictures} == pictures
    other = re.sub(r"^\| 20 \| [0-9.]+ \| 0 \|$", "| 20 | 99.0 | 0 |", text, flags=re.M)
    assert drawn(other)["train_labels"] != pictures["train_labels"]


def words_of(path: Path) -> list[str]:
    """The first column of the table `| word | meaning |`."""
    (table,) = re.findall(r"^\| word \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", path.read_text("utf-8"), re.MULTILINE)
    return [word for row in table.splitlines() for word in row.split("|")[1].strip().split(", ")]


def test_readme_uses_no_word_before_it_is_explained() -> None:
    text = re.sub(r"distributed[-_]rerank", "", (ROOT / "README.md").read_text("utf-8"))
    explained = {word: text.index("| word | meaning |") for word in words_of(ROOT / "README.md")}
    explained |= {word: text.index("](docs/words.md)") - 100 for word in words_of(ROOT / "docs" / "words.md")}
    assert len(explained) > 25
    early = [word for word, place in explained.items() if re.search(rf"\b{word}", text[:place], re.IGNORECASE)]
    assert early == []


def test_every_explained_word_is_in_use() -> None:
    pages = [path for path in DOCUMENTS if path.name != "words.md"]
    pages += [ROOT / "benchmarks" / "README.md", *(ROOT / "distributed_rerank" / "report").glob("*.py")]
    text = " ".join(path.read_text("utf-8") for path in pages)
    for word in words_of(ROOT / "docs" / "words.md"):
        assert re.search(rf"\b{word}", text, re.IGNORECASE), f"{word} is explained and nowhere used"


def prepare(folder: Path) -> None:
    """What a reader has: the repository, an environment, the demo's results, a folder of photos."""
    for path in ROOT.iterdir():
        if path.name not in ("out", ".venv", ".git"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    for name, words in {"python": "", "distributed-rerank": "-m distributed_rerank"}.items():
        program = folder / ".venv" / "bin" / name
        program.write_text(
            f'#!/bin/sh\nPYTHONPATH="{ROOT}:$PYTHONPATH" exec {shlex.quote(sys.executable)} {words} "$@"\n'
        )
        program.chmod(0o755)
    table = write_demo_catalogue(folder / "out" / "demo" / "catalogue", n_designs=16, size=64)
    (folder / "out" / "demo" / "extractor").mkdir()
    network = timm.create_model("test_resnet", norm_layer="groupnorm1")
    save_file(network.state_dict(), folder / "out" / "demo" / "extractor" / "extractor.safetensors")
    names = iter(["mug", "cup"])
    for label, rows in pd.read_csv(table).groupby("label"):
        target = folder / "photos" / next(names, str(label))
        target.mkdir(parents=True)
        for number, path in enumerate(rows["path"], 1):
            shutil.copyfile(table.parent / path, target / f"{number}.jpg")
    shutil.copyfile(folder / "photos" / "mug" / "1.jpg", folder / "query.jpg")


def script(document: str) -> list[str]:
    """The lines of one document, as they are run."""
    lines = []
    for block in BLOCKS:
        if block.document != document:
            continue
        if block.language == "python" and document == "README.md":
            lines += ["python - <<'END'", f"{NAMES}\n{replaced(block.code)}", "END"]
        for command in block.commands() if block.language == "bash" else ():
            if reason_not_to_run(command) is None:
                lines += [text for start, text in BEFORE.items() if command.startswith(start)]
                lines += [f"echo 'AT {document}:' {shlex.quote(command)} >&2", smaller(command)]
    return lines


def replaced(text: str) -> str:
    for found, other in REPLACED.items():
        text = text.replace(found, other)
    return text


def smaller(command: str) -> str:
    command = replaced(command)
    job = re.match(r"distributed-rerank (\S+)", command)
    added = SMALLER.get(job[1], "") if job else ""
    added = added.replace("--num-workers 0", "" if "$SETTINGS" in command else "--num-workers 0")
    return f"{command.removesuffix('&')} {added} {'&' if command.endswith('&') else ''}" if added else command


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_run_in_order_and_leave_what_the_text_says(tmp_path: Path) -> None:
    prepare(tmp_path)
    begin = ["set -eu", "PATH=$PWD/.venv/bin:$PATH", "trap 'kill $(jobs -p) || true; wait' EXIT"]
    port = free_ports(1)[0]
    lines = [line for path in DOCUMENTS for line in script(path.name)]
    done = subprocess.run(
        ["bash"], input="\n".join([*begin, *lines]), cwd=tmp_path, capture_output=True, text=True, timeout=880,
        env=environment_of_jobs() | {"PORT": str(port)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert '"relevance_score":' in done.stdout
    with socket.socket() as asked:
        assert asked.connect_ex(("127.0.0.1", port)), "the service still runs"
    files = "runs/evaluation/report.html out/own/evaluation/metrics.json out/own/reranked/reranked.parquet "
    files += "runs/own_step/metrics.json runs/vlm/metrics.json runs/comparison/comparison.md out/nightly/history.html"
    for file in files.split():
        assert (tmp_path / file).stat().st_size > 0, file
