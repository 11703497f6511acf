"""gpu.py loses only the part that fails, and gpu_bundle.py takes along all that is needed and no more than allowed."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
GPU = BENCHMARKS / "gpu.py"


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the folder benchmarks, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__(name)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("_gpu_measure", monkeypatch)


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("gpu_bundle", monkeypatch)


def run(*flags: str, path: tuple[Path, ...] = (ROOT,), script: Path = GPU) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=script.parent)


def test_parts_that_fail_or_take_too_long_lose_only_themselves(tmp_path: Path) -> None:
    # As on a machine where Ray was installed and cannot be imported.
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('no Ray on this machine')\n")
    out = tmp_path / "out"
    parts = ("ray-embed", "correctness", "search")
    flags = ("--quick", "--parts", *parts, "--limit", "correctness=3", "--out", str(out))
    done = run(*flags, path=(ROOT, tmp_path))
    assert done.returncode == 1, done.stderr
    results = json.loads((out / "results.json").read_text())["parts"]
    assert {name: results[name]["status"] for name in parts} == {
        "ray-embed": "failed",
        "correctness": "timed out",
        "search": "ok",
    }
    assert "ImportError: no Ray on this machine" in results["ray-embed"]["traceback"]
    # All threads' stacks, asked for when the time was up.
    assert "most recent call first" in results["correctness"]["traceback"]
    assert results["search"]["traceback"] == ""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["part"] == "search"]
    assert results["search"]["rows"] == found
    assert any(row["unit"] == "s" and row["value"] > 0 for row in found)
    for row in found:
        assert row["name"] in done.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--quick", "--limit", "search=soon"), "search=60"),
        (("--quick", "--limit", "seek=3"), "the parts are machine, correctness"),
        ((), "--quick"),
    ],
)
def test_wrong_options_end_with_a_line_that_says_what_to_give(flags: tuple[str, ...], expected: str) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]


def test_a_figure_is_judged_on_a_gpu_at_full_size_only(measure: ModuleType, tmp_path: Path) -> None:
    def verdicts(device: str, is_quick: bool) -> list[str]:
        file = tmp_path / f"{device}-{is_quick}.jsonl"
        context = measure.Context("part", torch.device(device), is_quick, tmp_path, file)
        context.row("rate", "pairs/s", 12_000.0, ("at least", 12_000.0))
        context.row("rate", "pairs/s", 11_999.0, ("at least", 12_000.0))
        context.row("time", "s", 2.0, ("at most", 2.0))
        context.row("time", "s", float("nan"), ("at most", 2.0))
        context.row("size", "GB", 1.0)
        return [json.loads(line)["verdict"] for line in file.read_text().splitlines()]

    assert verdicts("cuda", False) == ["pass", "short", "pass", "short", ""]
    assert verdicts("cuda", True) == verdicts("cpu", False) == [""] * 5


def test_an_attempt_keeps_the_traceback_and_the_part_goes_on(measure: ModuleType, tmp_path: Path) -> None:
    context = measure.Context("part", torch.device("cpu"), True, tmp_path, tmp_path / "rows.jsonl")
    with context.attempt("a piece"):
        raise ValueError("out of luck")
    assert len(context.failures) == 1
    assert "a piece" in context.failures[0]
    assert "ValueError: out of luck" in context.failures[0]
    with pytest.raises(KeyboardInterrupt), context.attempt("another"):
        raise KeyboardInterrupt
    context.check("an error that is none", 1e-4, 1e-3)
    assert len(context.failures) == 1
    context.check("NaN", float("nan"), 1e-3)
    assert "NaN" in context.failures[1]


def test_relative_error_is_that_of_the_definition(measure: ModuleType) -> None:
    reference = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = reference + torch.tensor([0.1, -0.1, 0.1, -0.1])
    assert measure.relative_error(found, reference) == pytest.approx(0.1 / 1.25**0.5, rel=1e-5)


def test_the_bundle_holds_every_file_that_a_part_needs(bundle: ModuleType, tmp_path: Path) -> None:
    bundle.copy_project(tmp_path / "project")
    for folder in ("distributed_rerank", "benchmarks", "jobs"):
        own = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        own = {path for path in own if "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc")}
        copied = {path.relative_to(tmp_path / "project") for path in (tmp_path / "project" / folder).rglob("*")}
        assert own <= copied, f"the bundle lacks {sorted(own - copied)}"
    assert (tmp_path / "project" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    # It runs from there, and nothing of the checkout is imported.
    script = tmp_path / "project" / "benchmarks" / "gpu.py"
    done = run(
        "--quick", "--parts", "search", "--out", str(tmp_path / "out"), path=(tmp_path / "project",), script=script
    )
    assert done.returncode == 0, done.stdout
    line = "import distributed_rerank; print(distributed_rerank.__file__)"
    (tmp_path / "where.py").write_text(line)
    where = run(path=(tmp_path / "project",), script=tmp_path / "where.py")
    assert where.stdout.startswith(str(tmp_path / "project"))


def test_the_size_limit_names_the_largest_files(bundle: ModuleType, tmp_path: Path) -> None:
    bundle.copy_project(tmp_path)
    sizes = bundle.sizes_of(tmp_path)
    total = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / 1e6
    assert bundle.check_size(sizes, 60.0) == pytest.approx(total)
    largest = max(sizes, key=sizes.__getitem__)
    with pytest.raises(SystemExit, match=f"(?s)more than 0.01 .*{largest.replace('.', '[.]')}"):
        bundle.check_size(sizes, 0.01)


def test_every_package_of_the_bundle_has_one_pinned_version(bundle: ModuleType) -> None:
    pinned = {line.strip().lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = bundle.wanted_packages()
    names = [package.partition("==")[0] for package in wanted]
    assert len({bundle.plain(name) for name in names}) == len(names)
    for package in wanted:
        spellings = {package.lower(), package.lower().replace("-", "_"), package.lower().replace("_", "-")}
        assert spellings & pinned, package
    assert {"ray", "pyarrow", "tyro"} <= set(names)


def make_wheel(folder: Path, package: str, files: dict[str, str]) -> Path:
    """A wheel of a pure package, version 1."""
    wheel, info = folder / f"{package}-1-py3-none-any.whl", f"{package}-1.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**content, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


def test_a_repacked_wheel_lacks_what_nothing_reads_and_says_so(bundle: ModuleType, tmp_path: Path) -> None:
    source = make_wheel(tmp_path, "ray", {"ray/__init__.py": "", "ray/jars/ray_dist.jar": "x" * 1000})
    bundle.repack(source, tmp_path / "slim.whl")
    with zipfile.ZipFile(tmp_path / "slim.whl") as slim:
        names = slim.namelist()
        record = slim.read("ray-1.dist-info/RECORD").decode()
    assert "ray/__init__.py" in names
    assert "ray/__init__.py" in record
    assert "ray/jars/ray_dist.jar" not in names
    assert "jar" not in record


def test_install_takes_only_what_is_missing_and_survives_a_broken_wheel(bundle: ModuleType, tmp_path: Path) -> None:
    good = make_wheel(tmp_path, "rerank_probe", {"rerank_probe.py": "ANSWER = 42\n"})
    known = make_wheel(tmp_path, "numpy", {"numpy/__init__.py": "raise ImportError\n"})
    broken = tmp_path / "rerank_broken-1-py3-none-any.whl"
    broken.write_bytes(b"no zip file")
    with tarfile.open(tmp_path / "wheels.tar.xz", "w:xz") as archive:
        for wheel in (good, known, broken):
            archive.add(wheel, wheel.name)
    folder = tmp_path / "site"
    flags = ("install", str(tmp_path / "wheels.tar.xz"), str(folder))
    done = run(*flags, script=BENCHMARKS / "gpu_bundle.py")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 packages are there already" in done.stdout
    assert "not installed: rerank_broken-1-py3-none-any.whl" in done.stdout
    assert (folder / "rerank_probe.py").read_text() == "ANSWER = 42\n"
    assert not (folder / "numpy").exists()
