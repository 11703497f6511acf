"""Wrong input ends in one clear line on standard error and exit code 2, and is found before Ray starts."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from job_files import EXTRACTOR

from distributed_rerank import command_line
from distributed_rerank.cluster import executors
from distributed_rerank.errors import BadInput, Outage, TakenFolder


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`fail("evaluate", ...)`: the one line that this job ends with, without having asked for Ray."""

    def refuse(config: object) -> None:
        raise AssertionError("Ray would have been started")

    monkeypatch.setattr(executors, "connect", refuse)

    def run(name: str, *arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command_line.main([name, *map(str, arguments)])
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said
        assert said.rstrip().endswith(errors[0]), f"more than one line: {said}"
        named = set(re.findall(r"--[a-z][a-z0-9-]+", errors[0])) - set(map(str, arguments))
        options = command_line.options_of(command_line.job_type(name))
        known = {"--help", *(f"--{option.flag}" for option in options)}
        assert named <= known, f"{name} has no such option: {errors[0]}"
        return errors[0]

    return run


def without(column: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.drop(columns=column)


def with_value(column: str, value: object, row: int | None = None) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        if row is None:
            return table.assign(**{column: value})
        table.loc[row, column] = value
        return table

    return change


def with_boxes(*corners: float | str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table[["x_1", "y_1", "x_2", "y_2"]] = ["0", "0", "30", "30"]
        table.loc[4, ["x_1", "y_1", "x_2", "y_2"]] = [str(corner) for corner in corners]
        return table

    return change


def with_one_image_of_each_label(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(index=table.index[(table["split"] == "train") & table["label"].duplicated()])


def with_repeated_row(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, table.iloc[[5]]])


TABLES = {
    "absent column": ("evaluate", without("label"), ["no column 'label'", "add it"]),
    "misspelt column": ("evaluate", lambda t: t.rename(columns={"path": "Path"}), ["did you mean 'Path'"]),
    "unknown split": ("evaluate", with_value("split", "test", 3), ["unknown split 'test'", "row 4"]),
    "one training image": ("train", with_one_image_of_each_label, ["0 train labels", "two images or more"]),
    "no query": ("evaluate", with_value("is_query", "False"), ["no query", "is_query"]),
    "no gallery": ("evaluate", with_value("is_gallery", "0"), ["no gallery", "is_gallery"]),
    "duplicate ids": ("embed", with_repeated_row, ["duplicate ids", "rows 6, 89"]),
    "box with NaN": ("embed", with_boxes(0, 0, "nan", 30), ["box with NaN", "row 5"]),
    "inverted box": ("embed", with_boxes(9, 0, 3, 30), ["inverted", "row 5"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_wrong_table_is_one_line(case: str, catalogue_path: Path, fail: Callable[..., str], tmp_path: Path) -> None:
    job, change, words = TABLES[case]
    change(pd.read_csv(catalogue_path, dtype=str, keep_default_na=False)).to_csv(tmp_path / "df.csv", index=False)
    line = fail(job, "--catalogue", tmp_path / "df.csv", "--out", tmp_path / "out", *EXTRACTOR)
    assert all(word in line for word in [*words, "df.csv"]), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["df.csv"]


ARGUMENTS = {
    "absent catalogue": ("embed", ["--catalogue", "nowhere.csv"], ["nowhere.csv", "check the path"]),
    "absent split": ("evaluate", ["--split", "test"], ["'test'", "choose another"]),
    "train split": ("evaluate", ["--split", "train"], ["is_query", "--split"]),
    "top_n below 2": (
        "evaluate",
        ["--model", "MODEL", "--chain", "replace", "--top-n", "1"],
        ["top_n=1", "at least 2"],
    ),
    "top_n above n_items": (
        "evaluate",
        ["--model", "MODEL", "--chain", "replace", "--top-n", "30", "--n-items", "20"],
        ["top_n=30", "the 20 retrieved", "--n-items"],
    ),
    "top_n without model": ("evaluate", ["--top-n", "5"], ["--top-n 5", "--model"]),
    "training top_n above n_items": ("train", ["--top-n", "500"], ["top_n=500", "raise --n-items"]),
    "unknown extractor": ("embed", ["--extractor", "resnet51"], ["resnet51", "did you mean", "resnet50"]),
    "unknown extractor in evaluate": ("evaluate", ["--extractor", "resnet51"], ["resnet51", "did you mean"]),
    "unknown extractor in train": ("train", ["--extractor", "resnet51"], ["resnet51", "did you mean"]),
    "weights that do not fit": ("embed", ["--extractor-weights", "WEIGHTS"], ["do not fit the architecture", "stem"]),
    "weights that are absent": ("embed", ["--extractor-weights", "no.pth"], ["no.pth", "does not exist"]),
    "wrong pairwise weights": (
        "train",
        ["--pairwise-model", "concat", "--pairwise-weights", "WEIGHTS"],
        ["other.pth", "give a state dict"],
    ),
    "absent model": ("evaluate", ["--model", "nowhere"], ["nowhere", "config.json"]),
    "absent chain": ("evaluate", ["--model", "MODEL", "--chain", "nowhere"], ["nowhere does not exist"]),
    "no cut-off": ("evaluate", ["--ks"], ["ks=[]", "--ks 1 5 10"]),
    "no candidates file": (
        "rerank",
        ["--model", "MODEL", "--candidates", "nowhere.csv"],
        ["nowhere.csv", "check the path"],
    ),
    "no embeddings": ("evaluate", ["--embeddings", "nowhere"], ["nowhere"]),
    "unknown flag": ("evaluate", ["--extracter", "x"], ["--extracter", "perhaps you meant --extractor"]),
    "unknown flag of train": ("train", ["--epoch", "5"], ["--epoch", "perhaps you meant --epochs"]),
    "invalid choice": ("train", ["--pairwise-model", "tokn"], ["'tokn'", "'token'"]),
    "no number": ("evaluate", ["--top-n", "ten"], ["--top-n", "ten"]),
    "no worker": ("evaluate", ["--num-workers=-1"], ["num_workers=-1", "give 1 or more"]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_argument_is_one_line(
    case: str, catalogue_path: Path, models: dict[str, Path], fail: Callable[..., str], tmp_path: Path
) -> None:
    job, arguments, words = ARGUMENTS[case]
    torch.save({"stem.weight": torch.zeros(3)}, tmp_path / "other.pth")
    places = {"MODEL": models["random"], "WEIGHTS": tmp_path / "other.pth"}
    given = [places.get(argument, argument) for argument in arguments]
    defaults = ["--catalogue", catalogue_path, "--out", tmp_path / "out"]
    # what comes last counts
    line = fail(job, *defaults, *EXTRACTOR, *given)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_missing_arguments_are_named(fail: Callable[..., str]) -> None:
    assert "--catalogue" in fail("evaluate", "--out", "x")
    line = fail("rerank")
    assert all(name in line for name in ("--catalogue", "--out"))
    assert "--model" in fail("rerank", "--catalogue", "x.csv", "--out", "x")


def test_no_extractor_is_one_line(catalogue_path: Path, fail: Callable[..., str], tmp_path: Path) -> None:
    common = ["--catalogue", catalogue_path, "--out", tmp_path / "out"]
    assert "--extractor" in fail("embed", *common)
    assert "--candidates" in fail("evaluate", *common)


def test_folder_of_another_config_is_refused_and_kept(
    catalogue_path: Path, run_job: Callable, fail: Callable[..., str], tmp_path: Path
) -> None:
    common = ["--catalogue", catalogue_path, "--out", tmp_path / "out", *EXTRACTOR]
    assert run_job("embed", *common).code == 0
    before = (tmp_path / "out" / "embeddings.parquet").read_bytes()
    line = fail("embed", *common, "--image-size", 40)
    assert all(word in line for word in ("image_size", "32", "40", "--overwrite")), line
    assert (tmp_path / "out" / "embeddings.parquet").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("not yours")
    line = fail("evaluate", "--catalogue", catalogue_path, "--out", tmp_path / "mine", *EXTRACTOR, "--overwrite")
    assert "not an output of this tool" in line
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "not yours"


def test_night_and_demo_say_what_helps_where_another_result_is(
    catalogue_path: Path, fail: Callable[..., str], tmp_path: Path
) -> None:
    """Neither has --overwrite, and a night has no --out."""
    extractor = ["--extractor", "test_resnet", "--extractor-weights", "none"]
    night = ["--catalogue", catalogue_path, *extractor, "--num-workers", 0, "--no-baselines", "--run-id", "1"]
    night += ["--history", tmp_path / "history.parquet", "--runs", tmp_path / "runs"]
    assert command_line.run(["scheduled-evaluation", *map(str, night), "--image-size", "32"]) == 0
    said = fail("scheduled-evaluation", *night, "--image-size", 40)
    assert re.search(r"runs/1 was made with .*=.*32.*, this run has .*=.*40.*; give another --run-id, or what", said)
    (tmp_path / "demo" / "extractor").mkdir(parents=True)
    (tmp_path / "demo" / "extractor" / "notes.txt").write_text("mine")
    said = fail("demo", "--out", tmp_path / "demo")
    assert f"not an output of this tool (no manifest.json); give another --out, or delete {tmp_path / 'demo'}" in said
    assert (tmp_path / "demo" / "extractor" / "notes.txt").read_text() == "mine"


def test_damaged_model_folder_is_one_line(
    catalogue_path: Path, models: dict[str, Path], fail: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(models["concat"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["config"]["hidden_dims"] = [16]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    line = fail(
        "evaluate", "--catalogue", catalogue_path, "--out", tmp_path / "out", *EXTRACTOR, "--model", tmp_path / "model"
    )
    assert "do not fit the architecture" in line


@pytest.mark.slow
def test_process_ends_with_code_2_and_one_line(catalogue_path: Path, start_job: Callable, tmp_path: Path) -> None:
    process = start_job("evaluate", "--catalogue", catalogue_path, "--out", tmp_path / "o", "--extractor", "resnet51")
    said = process.communicate()
    assert process.returncode == 2
    assert said[1].strip().splitlines()[-1].startswith("error: extractor resnet51")
    assert "Traceback" not in said[1]
    assert "Ray" not in said[1]


def test_an_error_can_be_made_anew_from_its_text_and_travels_between_processes() -> None:
    for error in (BadInput("a; b"), Outage("a; b"), TakenFolder("a", "b")):
        assert str(type(error)(str(error))) == str(error) == "a; b"
        assert str(pickle.loads(pickle.dumps(error))) == "a; b"
