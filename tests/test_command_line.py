"""The command line that all jobs share: one-line messages on any terminal, defaults, exit codes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from distributed_rerank import command_line
from distributed_rerank.command_line import ExtractorArguments, FirstStageArguments, PairwiseArguments
from distributed_rerank.errors import BadInput
from distributed_rerank.training.config import TrainingConfig, defaults_for

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """A checked part of the arguments."""

    depth: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise BadInput(f"depth={self.depth} is too little; give at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Of a job that exists for this test."""

    out: Path
    """Where to."""
    colour: Literal["red", "green"] = "red"
    top_n: int | None = None
    inner: tyro.conf.OmitArgPrefixes[Inner] = dataclasses.field(default_factory=Inner)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    out: Path
    pairwise: tyro.conf.OmitArgPrefixes[PairwiseArguments] = dataclasses.field(default_factory=PairwiseArguments)
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainingConfig)


MESSAGES = {
    "--colur green": "Unrecognized options: --colur, green; perhaps you meant --colour",
    "--zzzzzz": "Unrecognized options: --zzzzzz; --help lists the options",
    "--colour blue": "'blue' for argument '--colour'. Expected one of ('red', 'green'); --help lists the options",
    "--top-n many": "no type matching {None}|INT could be instantiated from ['many']; --help lists the options",
    "--top-n": "Missing value for argument '--top-n'. Expected 1 values; --help lists the options",
    "--depth 0": "depth=0 is too little; give at least 1",
}


@pytest.mark.parametrize("wrong", MESSAGES)
def test_parse_wrong_words_raise_one_line(wrong: str) -> None:
    with pytest.raises(BadInput) as error:
        command_line.parse(Arguments, "manual", ["--out", "x", *wrong.split()])
    assert str(error.value).endswith(MESSAGES[wrong])
    assert "\n" not in str(error.value)


def test_parse_missing_argument_is_named() -> None:
    with pytest.raises(BadInput, match=r"^required and not given: --out PATH; --help explains them$"):
        command_line.parse(Arguments, "manual", [])


@pytest.mark.parametrize("wrong", ["--uot x", "--uot=x"])
def test_parse_misspelt_required_argument_is_suggested(wrong: str) -> None:
    with pytest.raises(BadInput, match=r"^Unrecognized options: --uot; perhaps you meant --out$"):
        command_line.parse(Arguments, "manual", wrong.split())


def test_parse_unknown_argument_unlike_the_missing_one_is_not_suggested() -> None:
    with pytest.raises(BadInput, match=r"^required and not given: --out PATH; --help explains them$"):
        command_line.parse(Arguments, "manual", ["--zzz", "x"])


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_parse_message_is_the_same_on_any_terminal(encoding: str) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests'); from test_command_line import Arguments\n"
        "from distributed_rerank import command_line\n"
        "command_line.run(print, Arguments, 'manual', argv=['--out', 'x', '--top', '3'])\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "20", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert done.stderr == "error: Unrecognized options: --top, 3; perhaps you meant --top-n\n"


def test_parse_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    command_line.parse(Arguments, "manual", ["--out", "x"])
    assert os.environ["COLUMNS"] == "77"
    monkeypatch.delenv("COLUMNS")
    command_line.parse(Arguments, "manual", ["--out", "x"])
    assert "COLUMNS" not in os.environ


def test_help_shows_manual_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.parse(Arguments, "How to use this.", ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "How to use this." in shown
    assert "Where to." in shown


@pytest.mark.parametrize("words", [["--pairwise-model", "concat"], ["--pairwise-model=concat"]])
def test_training_defaults_follow_the_pairwise_model(words: list[str]) -> None:
    given = command_line.parse(TrainingArguments, "", ["--out", "x", *words], command_line.training_defaults)
    assert given.training == defaults_for("concat")
    changed = command_line.parse(
        TrainingArguments, "", ["--out", "x", *words, "--epochs", "3", "--augmentation.flip", "0"],
        command_line.training_defaults,
    )  # fmt: skip
    assert changed.training.epochs == 3
    assert changed.training.augmentation is not None
    assert changed.training.augmentation.flip == 0
    assert changed.training.lr == defaults_for("concat").lr


def test_extractor_arguments_reach_the_config() -> None:
    given = FirstStageArguments(
        extractor="resnet18", extractor_weights="none", extractor_args=("pad_type=same", "depth=2"), image_size=64,
        mean=(0.5, 0.5, 0.5), images_per_block=7, threads_per_worker=2, queries_per_block=5, n_items=9,
    )  # fmt: skip
    parts = given.parts()
    extractor = parts["extraction"].extractor
    assert (extractor.name, extractor.weights, extractor.image_size) == ("resnet18", "none", 64)
    assert (dict(extractor.args), extractor.mean) == ({"pad_type": "same", "depth": 2}, (0.5, 0.5, 0.5))
    assert (parts["extraction"].block_size, parts["scoring"].queries_per_block) == (7, 5)
    assert (parts["retrieval"].n_items, parts["retrieval"].queries_per_block) == (9, 5)
    assert {parts[name].threads_per_worker for name in ("extraction", "retrieval", "scoring")} == {2}


def test_pairwise_options_of_another_model_are_refused() -> None:
    config = ExtractorArguments(extractor="resnet18").config()
    with pytest.raises(BadInput, match="--both-orders"):
        PairwiseArguments(pairwise_model="token", both_orders=True).config(config)
    assert PairwiseArguments(pairwise_model="concat", both_orders=True).config(config).both_orders


@pytest.mark.parametrize(
    ("outcome", "code"), [(None, 0), (0, 0), (3, 3), (BadInput("x=1 is wrong; give 2"), 2), (KeyboardInterrupt(), 130)]
)
def test_run_exit_code_says_how_it_ended(outcome: object, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def job(arguments: Arguments) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome if isinstance(outcome, int) else None

    with pytest.raises(SystemExit) as stop:
        command_line.run(job, Arguments, "manual", argv=["--out", "x"])
    assert (stop.value.code or 0) == code
    said = capsys.readouterr().err
    assert said.startswith({2: "error: x=1 is wrong; give 2\n", 130: "interrupted: "}.get(code, ""))


def test_run_own_mistakes_keep_their_trace() -> None:
    def job(arguments: Arguments) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command_line.run(job, Arguments, "manual", argv=["--out", "x"])
