"""The flags of a job, found in its dataclasses: for the short help, and for flags that would have no effect."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

_OMIT_PREFIX = typing.get_args(OmitArgPrefixes[int])[1]


@dataclass(frozen=True)
class Option:
    """A flag without its dashes, the field that it sets, and what its help says."""

    flag: str
    field: str
    values: str
    """What follows the flag; "" for a switch."""
    text: str
    default: Any
    """dataclasses.MISSING where the flag is required."""


def options_of(config: Any, prefix: str = "") -> Iterator[Option]:
    """The options of a config class, or of an instance with its values as defaults, nested configs included."""
    kind = config if isinstance(config, type) else type(config)
    hints, texts = typing.get_type_hints(kind, include_extras=True), field_texts(kind)
    for field in dataclasses.fields(kind):
        default = _default(field) if config is kind else getattr(config, field.name)
        hint = hints[field.name]
        annotation, *metadata = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        name = next((m.name for m in metadata if getattr(m, "name", None) is not None), field.name)
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            is_flat = name == "" or _OMIT_PREFIX in metadata
            yield from options_of(default, prefix if is_flat else f"{prefix}{name}.")
        elif isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from options_of(annotation, prefix if _OMIT_PREFIX in metadata else f"{prefix}{name}.")
        else:
            flag = f"{prefix}{name}".replace("_", "-")
            yield Option(flag, field.name, _values(annotation, name), texts.get(field.name, ""), default)


def configs_in(config: Any) -> Iterator[Any]:
    """The configs within a job or config, nested ones included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield value
            yield from configs_in(value)


def field_texts(kind: type) -> Mapping[str, str]:
    """The text below each field of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):
            continue  # made by the command line, whose fields stand in a base too
        assert isinstance(definition, ast.ClassDef), "the source of a class is a class"
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            if is_field and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                texts[statement.target.id] = " ".join(str(following.value.value).split())  # pyright: ignore
    return texts


def flags_in(argv: Sequence[str]) -> list[str]:
    """The flags on a command line, without dashes, values and the `no-` of switches that are turned off."""
    words = list(argv)
    words = words[: words.index("--")] if "--" in words else words
    return [word[2:].partition("=")[0].removeprefix("no-") for word in words if word.startswith("--")]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _values(annotation: Any, name: str) -> str:
    """The placeholder of a flag's values."""
    if annotation is bool:
        return ""
    choices = [
        str(choice)
        for part in (annotation, *typing.get_args(annotation))
        if typing.get_origin(part) is Literal
        for choice in typing.get_args(part)
    ]
    more = " ..." if typing.get_origin(annotation) is tuple or name.endswith("args") else ""
    return ("{" + ",".join(choices) + "}" if choices else name.replace("-", "_").upper()) + more
