"""Make, and install, the folder that a GPU machine without a network needs to run gpu.sh.

    python benchmarks/gpu_bundle.py make [--out out/gpu_bundle]      # here: downloads wheels, at most 60 MB in all
    python benchmarks/gpu_bundle.py install WHEELS.tar.xz FOLDER     # there: what gpu.sh calls

`make` copies the project's own files to `project/` and packs the wheels into `wheels.tar.xz`. Run on the GPU machine:
`bash gpu_bundle/project/benchmarks/gpu.sh`. The wheels are for Python 3.12 on x86-64 Linux, whatever runs this script,
in the versions of constraints.txt. torch, torchvision, timm, numpy and pillow must be there already. `install` leaves
out every package that the machine has. This script needs Python's standard library alone.
"""

import argparse
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PROJECT = (
    "distributed_rerank",
    "benchmarks",
    "jobs",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
)
MB = 1_000_000
LIMIT_MB = 60.0

PACKAGES = {
    "the project": "pyarrow jaxtyping wadler_lindig tyro typeguard docstring_parser pandas python-dateutil six",
    "Ray": "ray msgpack protobuf jsonschema jsonschema-specifications referencing rpds-py attrs requests "
    "charset-normalizer urllib3 certifi click pydantic pydantic_core annotated-types typing-inspection tensorboardX",
    "training logs": "tensorboard absl-py Markdown Werkzeug",
}
"""What a machine with torch and timm may lack, without what these name as needs and the machine has in any case."""

LEFT_OUT = {
    "ray": ("ray/jars/", "ray/dashboard/client/", "ray/rllib/", "ray/llm/", "ray/serve/", "ray/core/libjemalloc.so"),
    "pyarrow": (
        "pyarrow/include/", "pyarrow/src/", "pyarrow/tests/", "pyarrow/_pyarrow_cpp_tests",
        "pyarrow/libarrow_flight", "pyarrow/libarrow_python_flight", "pyarrow/_flight",
    ),
    "tensorboard": ("tensorboard/webfiles.zip",),
    "pandas": ("pandas/tests/",),
}  # fmt: skip
"""Beginnings of the names of files that nothing here reads: Java, web pages, RLlib, servers, tests.

Arrow's own library needs libarrow_substrait, and Ray Train asks for the class of S3.
"""


def project_files() -> list[Path]:
    """The project's files that travel, relative to its root: those that git knows or would add.

    Raises SystemExit where this is no git checkout, such as an unpacked bundle.
    """
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PROJECT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{ROOT} is no git checkout, so its files are unknown; run this in one: {done.stderr.strip()}")
    names = sorted(set(done.stdout.split("\0")) - {""})
    return [Path(name) for name in names if (ROOT / name).is_file()]


def copy_project(out: Path) -> None:
    """A fresh copy of `project_files` in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    for file in project_files():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, out / file)


def wanted_packages() -> list[str]:
    """All packages, each with the version that constraints.txt pins."""
    pinned: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, separator, version = line.partition("==")
        if separator:
            pinned[plain(name)] = version.strip()
    names = " ".join(PACKAGES.values()).split()
    missing = [name for name in names if plain(name) not in pinned]
    if missing:
        sys.exit(f"constraints.txt pins no version of {', '.join(missing)}; add them there")
    return [f"{name}=={pinned[plain(name)]}" for name in names]


def plain(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def package_of(wheel: Path) -> str:
    """The name of the package in a wheel, as `plain` writes it."""
    return plain(wheel.name.split("-")[0])


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """Wheels of these packages for the GPU machine, without their needs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation=cp", f"--python-version={PYTHON}", *(f"--platform={name}" for name in PLATFORMS)]
    subprocess.run([*command, f"--dest={folder}", *packages], check=True)
    return sorted(folder.glob("*.whl"))


def repack(wheel: Path, target: Path) -> None:
    """The same wheel without what LEFT_OUT names and without compression, since all are compressed together."""
    left_out = LEFT_OUT.get(package_of(wheel), ())
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        for item in source.infolist():
            if item.filename.startswith(left_out):
                continue
            content = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not line.startswith(left_out)).encode()
            item.compress_type = zipfile.ZIP_STORED
            out.writestr(item, content)


def pack_wheels(packages: Sequence[str], target: Path) -> None:
    """Downloads, repacks and compresses; Ray's three programs share half of their code, so as one archive."""
    with tempfile.TemporaryDirectory() as scratch:
        slim = Path(scratch) / "slim"
        slim.mkdir()
        for wheel in download(packages, Path(scratch)):
            repack(wheel, slim / wheel.name)
        unfinished = target.with_name(target.name + ".part")
        with tarfile.open(unfinished, "w:xz", preset=9) as archive:
            for wheel in sorted(slim.iterdir()):
                archive.add(wheel, wheel.name)
        unfinished.replace(target)


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of every file below the folder."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def check_size(sizes: dict[str, int], limit_mb: float) -> float:
    """The sum in MB. Raises SystemExit above the limit, with the largest files."""
    total = sum(sizes.values()) / MB
    if total > limit_mb:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
        named = ", ".join(f"{name} {size / MB:.1f}" for name, size in largest)
        sys.exit(
            f"the bundle has {total:.1f} MB, more than {limit_mb:g} (--limit-mb); the largest files, in MB: {named}"
        )
    return total


def make(out: Path, limit_mb: float) -> None:
    """The folder with the project's files as they are now, and the wheels, packed anew only where the list changed."""
    out.mkdir(parents=True, exist_ok=True)
    copy_project(out / "project")
    packages = wanted_packages()
    recipe = "\n".join([*packages, PYTHON, *PLATFORMS, str(sorted(LEFT_OUT.items()))])
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    mark = out / "wheels.sha256"
    if not (out / "wheels.tar.xz").is_file() or not mark.is_file() or mark.read_text() != digest:
        print(f"packing {len(packages)} wheels: some minutes", flush=True)
        pack_wheels(packages, out / "wheels.tar.xz")
        mark.write_text(digest)
    sizes = sizes_of(out)
    total = check_size(sizes, limit_mb)
    wheels = sizes["wheels.tar.xz"] / MB
    print(f"{out}: {total:.1f} MB, {wheels:.1f} of it wheels; there: bash {out.name}/project/benchmarks/gpu.sh")


def is_installed(package: str) -> bool:
    """Whether this Python finds the package, in any version."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(archive: Path, folder: Path) -> None:
    """Installs the wheels of packages that this Python lacks into `folder`: all at once, else one after the other."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        wheels = sorted(Path(scratch).glob("*.whl"))
        missing = [wheel for wheel in wheels if not is_installed(package_of(wheel))]
        print(f"{len(wheels) - len(missing)} of {len(wheels)} packages are there already", flush=True)
        if not missing or pip_install(missing, folder):
            return
        failed = [wheel.name for wheel in missing if not pip_install([wheel], folder)]
        print(f"not installed: {', '.join(failed) or 'none'}", flush=True)


def pip_install(wheels: Iterable[Path], folder: Path) -> bool:
    """Whether pip could install these wheels, and nothing else, into the folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(folder)]
    return subprocess.run([*command, *map(str, wheels)], check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make", help="make the bundle")
    making.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_bundle")
    making.add_argument("--limit-mb", type=float, default=LIMIT_MB)
    installing = verbs.add_parser("install", help="install what is missing")
    installing.add_argument("archive", type=Path)
    installing.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "make":
        make(arguments.out, arguments.limit_mb)
    else:
        install(arguments.archive, arguments.folder)


if __name__ == "__main__":
    main()
