"""The command line: one-line messages on any terminal, defaults, help, exit codes, and what is imported when."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from distributed_rerank import command_line
from distributed_rerank.config.jobs import JOBS, EvaluateJob, TrainJob
from distributed_rerank.config.options import options_of
from distributed_rerank.config.pairwise import PAIRWISE_CONFIGS
from distributed_rerank.config.training import EXTRACTOR_DEFAULTS, defaults_for
from distributed_rerank.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
FILES = ["--catalogue", "x.csv", "--out", "x"]

MESSAGES = {
    "--modle m": "Unrecognized options: --modle, m; perhaps you meant --model",
    "--zzzzzz": "Unrecognized options: --zzzzzz; --help lists the options",
    "--resize blue": "'blue' for argument '--resize'. Expected one of ('square', 'crop'); --help lists the options",
    "--missing-lists no": "Expected one of ('error', 'leave_out', 'miss'); --help lists the options",
    "--top-n many": "no type matching {None}|INT could be instantiated from ['many']; --help lists the options",
    "--top-n": "Missing value for argument '--top-n'. Expected 1 values; --help lists the options",
    "--n-items 0": "n_items=0 must be at least 1",
    "--extractor-args depth": "must have the form NAME=VALUE, such as pad_type=same; --help lists the options",
}


@pytest.mark.parametrize("wrong", MESSAGES)
def test_parse_wrong_words_raise_one_line(wrong: str) -> None:
    with pytest.raises(BadInput) as error:
        command_line.parse("evaluate", [*FILES, *wrong.split()])
    assert str(error.value).endswith(MESSAGES[wrong])
    assert "\n" not in str(error.value)


def test_parse_missing_argument_is_named() -> None:
    with pytest.raises(BadInput, match=r"^required and not given: --catalogue STR, --out PATH; --help explains them$"):
        command_line.parse("evaluate", [])


@pytest.mark.parametrize("wrong", ["--uot x", "--uot=x"])
def test_parse_misspelt_required_argument_is_suggested(wrong: str) -> None:
    with pytest.raises(BadInput, match=r"^Unrecognized options: --uot; perhaps you meant --out$"):
        command_line.parse("embed", ["--catalogue", "x", *wrong.split()])


def test_parse_unknown_argument_unlike_the_missing_one_is_not_suggested() -> None:
    with pytest.raises(BadInput, match=r"^required and not given: --out PATH; --help explains them$"):
        command_line.parse("embed", ["--catalogue", "x", "--zzz", "x"])


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distributed_rerank", *words], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_parse_message_is_the_same_on_any_terminal(encoding: str) -> None:
    done = run("evaluate", *FILES, "--top", "3", PYTHONIOENCODING=encoding, COLUMNS="20")
    assert done.returncode == 2
    assert done.stderr == "error: Unrecognized options: --top, 3; perhaps you meant --top-n\n"


def test_parse_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    command_line.parse("embed", FILES)
    assert os.environ["COLUMNS"] == "77"
    monkeypatch.delenv("COLUMNS")
    command_line.parse("embed", FILES)
    assert "COLUMNS" not in os.environ


@pytest.mark.parametrize("name", JOBS)
def test_help_shows_the_manual_and_the_first_options_and_ends_well(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == (JOBS[name].__doc__ or "").strip().splitlines()[0]
    shown = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert shown == command_line.FIRST_OPTIONS[name].split()
    assert len(shown) <= 10


@pytest.mark.parametrize("name", JOBS)
def test_help_all_knows_every_option_that_the_short_help_is_made_from(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.parse(name, ["--help-all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in options_of(command_line.job_type(name)):
        words = {("submit", "command"), ("catalogue", "folder"), ("compare", "results"), ("serve", "model")}
        is_word = (name, option.flag) in words
        if not is_word:
            assert f"--{option.flag} " in shown.replace("\n", " ").replace(",", " "), option.flag


@pytest.mark.parametrize("name", JOBS)
def test_every_option_has_a_text_and_a_unit_free_name(name: str) -> None:
    options = list(options_of(command_line.job_type(name)))
    assert [option.flag for option in options if not option.text] == []
    assert len({option.flag for option in options}) == len(options), "a flag is declared twice"


def test_overview_and_version() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in JOBS)
    assert run("--version").stdout.startswith("distributed-rerank ")
    wrong = run("evaluat")
    assert (wrong.returncode, wrong.stderr) == (2, "error: there is no job 'evaluat'; perhaps you meant evaluate\n")


@pytest.mark.parametrize("words", [["--pairwise-model", "concat"], ["--pairwise-model=concat"]])
def test_training_defaults_follow_the_pairwise_model(words: list[str]) -> None:
    job = command_line.parse("train", [*FILES, *words])
    assert job.training == defaults_for("concat")
    assert type(job.pairwise) is PAIRWISE_CONFIGS["concat"]
    changed = command_line.parse("train", [*FILES, *words, "--epochs", "3", "--augmentation.flip", "0"])
    assert changed.training.epochs == 3
    assert changed.training.augmentation.flip == 0
    assert changed.training.lr == defaults_for("concat").lr


def test_training_of_an_extractor_has_defaults_of_its_own() -> None:
    assert command_line.parse("train-extractor", FILES).training == EXTRACTOR_DEFAULTS


def test_extractor_options_reach_the_config() -> None:
    job = command_line.parse(
        "evaluate",
        [*FILES, "--extractor", "resnet18", "--extractor-weights", "none", "--extractor-args", "pad_type=same",
         "depth=2", "--image-size", "64", "--mean", "0.5", "0.5", "0.5", "--images-per-block", "7",
         "--threads-per-worker", "2", "--queries-per-block", "5", "--n-items", "9"],
    )  # fmt: skip
    assert isinstance(job, EvaluateJob)
    extractor = job.first_stage.extractor
    assert (extractor.name, extractor.weights, extractor.image_size) == ("resnet18", "none", 64)
    assert (dict(extractor.args), extractor.mean) == ({"pad_type": "same", "depth": 2}, (0.5, 0.5, 0.5))
    assert (job.work.images_per_block, job.work.queries_per_block, job.work.threads_per_worker) == (7, 5, 2)
    assert job.first_stage.n_items == 9


def test_every_knob_of_the_token_model_has_a_flag() -> None:
    job = command_line.parse(
        "train",
        [*FILES, "--grid", "7", "--token-dim", "32", "--token-storage", "int8", "--depths", "-3", "-1", "--pools", "1",
         "--global-dim", "64", "--hidden-dim", "8", "--head-dropout", "0"],
    )  # fmt: skip
    assert isinstance(job, TrainJob)
    changed = {"grid": 7, "token_dim": 32, "token_storage": "int8", "depths": (-3, -1), "pools": (1,)}
    changed |= {"global_dim": 64, "hidden_dim": 8, "head_dropout": 0.0}
    assert dataclasses.asdict(job.pairwise).items() >= changed.items()


WITHOUT_EFFECT = {
    "--split-at 4": "--split-at is an option of --pairwise-model split; token has none",
    "--both-orders": "--both-orders is an option of --pairwise-model concat or split; token has none",
    "--pairwise-model split --grid 3": "--grid is an option of --pairwise-model token; split has none",
    "--n-labels 3": "--n-labels has no effect with these settings; leave it out, or add --mining batch",
    "--momentum 0.5": "--momentum has no effect with these settings; leave it out, or add --optimizer sgd",
    "--pairwise-model concat --mining batch --loss bce --filters.range-min 2": "--filters has no effect",
    "--crop-pct 0.5": "--crop-pct has no effect with these settings; leave it out, or add --resize crop",
}


@pytest.mark.parametrize("words", WITHOUT_EFFECT)
def test_flag_that_would_have_no_effect_is_refused_by_name(words: str) -> None:
    with pytest.raises(BadInput) as error:
        command_line.parse("train", [*FILES, *words.split()])
    assert str(error.value).startswith(WITHOUT_EFFECT[words])


def test_flag_with_an_effect_is_taken() -> None:
    job = command_line.parse("train", [*FILES, "--optimizer", "sgd", "--momentum", "0.5", "--resize", "crop",
                                       "--crop-pct", "0.5"])  # fmt: skip
    assert (job.training.momentum, job.pairwise.extractor.crop_pct) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("outcome", "code"), [(None, 0), (0, 0), (3, 3), (BadInput("x=1 is wrong; give 2"), 2), (KeyboardInterrupt(), 130)]
)
def test_main_exit_code_says_how_it_ended(
    outcome: object, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(words: list[str]) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome if isinstance(outcome, int) else None

    monkeypatch.setattr(command_line, "run", job)
    with pytest.raises(SystemExit) as stop:
        command_line.main(["embed"])
    assert (stop.value.code or 0) == code
    said = capsys.readouterr().err
    assert said.startswith({2: "error: x=1 is wrong; give 2\n", 130: "interrupted: "}.get(code, ""))


def test_main_own_mistakes_keep_their_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(words: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(command_line, "run", job)
    with pytest.raises(ZeroDivisionError):
        command_line.main(["embed"])


BROKEN = "label,path,split,is_query,is_gallery\nx,a.png,nonsense,1,1\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["evaluate", "--help"], 0, ""),
        (["evaluate", "--catalogue", "nowhere.csv", "--out", "x", "--extractor", "resnet18"], 2, "nowhere.csv"),
        (["evaluate", "--catalogue", "TABLE", "--out", "x", "--extractor", "resnet18"], 2, "unknown split 'nonsense'"),
        (
            ["evaluate", "--catalogue", "TABLE", "--out", "x", "--model", "nowhere", "--extractor", "y"],
            2,
            "config.json",
        ),
        (["train", *FILES, "--epoch", "3"], 2, "perhaps you meant --epochs"),
    ],
)
def test_wrong_input_is_told_before_torch_timm_or_ray_is_imported(
    words: list[str], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "df.csv").write_text(BROKEN)
    words = [str(tmp_path / "df.csv") if word == "TABLE" else word for word in words]
    program = (
        "import sys\nfrom distributed_rerank import command_line\n"
        "try:\n    command_line.main(sys.argv[1:])\nexcept SystemExit as stop:\n"
        "    heavy = {'torch', 'timm', 'ray', 'torchvision'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n    sys.exit(stop.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr


def test_package_has_a_face_that_loads_nothing_heavy() -> None:
    program = (
        "import sys, distributed_rerank as d\n"
        "assert not {'torch', 'timm', 'ray', 'pandas', 'numpy'} & set(sys.modules)\n"
        "d.ExtractorConfig, d.read_catalogue\n"
        "assert not {'torch', 'timm', 'ray'} & set(sys.modules)\n"
        "assert set(d.__all__) == set(d._MODULES)\n"
        "for name in d.__all__: assert getattr(d, name).__name__ == name\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_tyro_can_omit_prefixes_as_the_option_table_assumes() -> None:
    assert tyro.conf.OmitArgPrefixes is not None
    job = command_line.parse("scheduled-evaluation", ["--catalogue", "x", "--history", "h.parquet", "--runs", "r"])
    assert (str(job.schedule.history), job.schedule.metric) == ("h.parquet", "map@10")


class OutOfMemoryError(Exception):
    """As torch and Ray name theirs."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:132] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OutOfMemoryError("a worker was ended"),
    ],
)
def test_refused_memory_is_one_line_and_exit_code_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "run", fail)
    with pytest.raises(SystemExit) as stop:
        command_line.main(["embed"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: there is not enough memory; lower --images-per-batch")
    assert "the same command goes on" in line


def test_another_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(command_line, "run", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        command_line.main(["embed"])
