"""Classes and functions of your own, named as `package.module:Name`; the module must be on Python's path."""

import importlib
import re
from typing import Any

from distributed_rerank.errors import BadInput

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Whether a name has the form `package.module:Name`."""
    return _NAME.fullmatch(name) is not None and not name.startswith("hf_hub:")


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
