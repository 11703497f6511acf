"""Classes and functions of your own, named as `package.module:Name`; the module must be on Python's path."""

import importlib
import importlib.util
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed_rerank.errors import BadInput

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

_PACKAGES = {"site-packages", "dist-packages"}
"""Folders of installed packages, those of the system's Python too."""


def is_own(name: str) -> bool:
    """Whether a name has the form `package.module:Name`."""
    return _NAME.fullmatch(name) is not None and not name.startswith("hf_hub:")


def refuse_foreign(name: str, source: str) -> None:
    """Raises BadInput for a name in the file `source` whose module is not of your own.

    A model folder may come from somebody else: it must not name code of Python's library, of this package or of another
    installed one, such as `os:system`.
    """
    root = name.partition(":")[0].partition(".")[0]
    found = importlib.util.find_spec(root)
    places = [*(found.submodule_search_locations or ()), found.origin or ""] if found is not None else []
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    is_installed = root == __name__.partition(".")[0] or any(
        Path(place).is_relative_to(folder) or not _PACKAGES.isdisjoint(Path(place).parts)
        for place in places
        for folder in installed
    )
    if found is not None and (is_installed or not any(Path(place).exists() for place in places)):
        raise BadInput(
            f"{source} names {name}, which is no module of your own; only those in a folder on PYTHONPATH are run"
        )


def load_own(name: str) -> Any:
    """What the name stands for. Raises BadInput where the module cannot be imported or has no such name.

    Every process that needs it imports it: Ray's workers too, so the module must be on their path as well.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"{name}: the module {module} cannot be imported ({error}); put its folder on PYTHONPATH"
        ) from error
    if not hasattr(found, attribute):
        raise BadInput(f"{name}: the module {module} has no {attribute}; name a class or a function of it")
    return getattr(found, attribute)


def load_function(name: str, option: str, known: Sequence[str] = ()) -> Any:
    """The function that `option` names as `package.module:function`.

    Raises BadInput for what has not that form, with the words that are `known` beside it, and as `load_own` does.
    """
    if not is_own(name):
        others = f"; known are {', '.join(known)}, or your own" if known else "; give it"
        raise BadInput(f"{option} {name} is unknown{others} as package.module:function")
    found = load_own(name)
    if not callable(found):
        raise BadInput(f"{option} {name} is no function")
    return found
