"""`name=value` words of a command line as a dictionary."""

import ast
from collections.abc import Iterable
from typing import Any

from distributed_rerank.errors import BadInput


def parse_named_values(words: Iterable[str]) -> dict[str, Any]:
    """`["pad_type=same", "depth=2"]` -> {"pad_type": "same", "depth": 2}. Raises BadInput for any other form."""
    parsed = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not name.isidentifier():
            raise BadInput(f"extractor argument {word!r} must have the form NAME=VALUE, such as pad_type=same")
        parsed[name] = python_literal(value)
    return parsed


def python_literal(value: Any) -> Any:
    """A text as the Python literal that it spells, or as it is where it spells none; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
