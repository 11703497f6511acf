"""Build the API reference from the docstrings: `make docs`. A warning ends it with an error.

python docs/reference.py out/docs
"""

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc
import tyro

import distributed_rerank


def main(folder: Path) -> None:
    """Write one page for each module into `folder`."""
    warnings.simplefilter("error", UserWarning)
    for name in distributed_rerank.__all__:
        # The package imports its names when they are used; pdoc looks for them in the module.
        setattr(distributed_rerank, name, getattr(distributed_rerank, name))
    # Named in __all__, else pdoc leaves the folders out.
    distributed_rerank.__all__ += [module.name for module in pkgutil.iter_modules(distributed_rerank.__path__)]
    modules = [module.name for module in pkgutil.walk_packages(distributed_rerank.__path__, "distributed_rerank.")]
    modules = [name for name in modules if not name.endswith("__main__")]
    without_text = [name for name in modules if not (importlib.import_module(name).__doc__ or "").strip()]
    if without_text:
        sys.exit(f"modules without a docstring: {', '.join(without_text)}")
    pdoc.render.configure(docformat="markdown", show_source=False)
    pdoc.pdoc("distributed_rerank", output_directory=folder)
    sys.stdout.write(f"{len(modules) + 1} modules: {folder / 'index.html'}\n")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
