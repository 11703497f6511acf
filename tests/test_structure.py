"""The structure that the README promises: imports go down only, no circle, short functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "distributed_rerank"
# A module may import from its own folder and from every folder of a lower number.
LAYER = {
    "errors": 0,
    "config": 1,
    "svg": 1,
    "content_policy": 1,
    "runtime": 2,
    "tensors": 2,
    "storage": 3,
    "demo": 4,
    "data": 4,
    "importing": 5,
    "models": 5,
    "approximate": 5,
    "extraction": 6,
    "retrieval": 6,
    "scoring": 6,
    "chain": 6,
    "executors": 7,
    "training": 8,
    "reranking": 8,
    "report": 8,
    "evaluation": 9,
    "online": 9,
    "monitoring": 10,
    "cluster": 11,
    "jobs": 12,
    "command_line": 13,
    "__main__": 14,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _imported(path: Path) -> set[str]:
    """Names of the package's modules that the file imports, as dotted paths without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            base = (node.module or "").split(".")[1:]
            for alias in node.names:
                whole = [*base, alias.name]
                is_module = (PACKAGE.joinpath(*whole).with_suffix(".py")).exists() or PACKAGE.joinpath(*whole).is_dir()
                found.add(".".join(whole if is_module else base))
        elif isinstance(node, ast.Import):
            found |= {".".join(a.name.split(".")[1:]) for a in node.names if a.name.startswith(PACKAGE.name + ".")}
    return {name for name in found if name}


def _dotted(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = _dotted(path).split(".")[0]
    for name in _imported(path):
        other = name.split(".")[0]
        if own in ("", other):
            continue
        assert LAYER[other] < LAYER[own], f"{path.name} (layer {LAYER[own]}) imports {name} (layer {LAYER[other]})"


def test_imports_have_no_circle() -> None:
    graph = {_dotted(path): _imported(path) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        if module in done:
            return
        for other in graph.get(module, ()):
            if other != module:
                visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())
    assert set(graph) <= done


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_of_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 < 60, f"{path.name}: {node.name} is longer than a screen"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_cluster_imports_ray_or_collectives(path: Path) -> None:
    if _dotted(path).startswith("cluster"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        banned = [n for n in names if n.split(".")[0] == "ray" or n.startswith("torch.distributed")]
        assert not banned, f"{path.name} imports {banned}"


def test_no_chain_of_imports_is_longer_than_twelve_modules() -> None:
    """Whoever reads a module has to know fewer than these; a longer chain wants a cut, not a larger number."""
    graph = {_dotted(path): _imported(path) - {_dotted(path), ""} for path in MODULES}
    graph.pop("")  # the face imports lazily
    lengths: dict[str, int] = {}

    def length(module: str) -> int:
        if module not in lengths:
            lengths[module] = 1 + max((length(other) for other in graph[module] if other in graph), default=0)
        return lengths[module]

    assert max(map(length, graph)) <= 12


def test_no_folder_is_a_fifth_of_the_package() -> None:
    """A folder that holds everything says nothing; one that comes near wants to be two."""
    lines = {path: len(path.read_text().splitlines()) for path in MODULES}
    of_folder: dict[str, int] = {}
    for path, count in lines.items():
        folder = path.relative_to(PACKAGE).parts[0]
        of_folder[folder] = of_folder.get(folder, 0) + count
    assert max(of_folder.values()) <= sum(lines.values()) / 5, of_folder
