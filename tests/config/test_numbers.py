"""Every option with a number has a range: nobody trains with nan, or gets the default for an image size of 0."""

import ast
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distributed_rerank.config
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import TokenSiameseConfig
from distributed_rerank.errors import BadInput

REQUIRED = {str: "x", Path: Path("x"), int: 1}
NEGATIVE = {
    *("NegativeFilters.absolute_margin", "NegativeFilters.relative_margin", "NegativeFilters.min_distance"),
    *("ExtractorConfig.mean", "TokenSiameseConfig.depths", "DistanceSiameseConfig.output_bias"),
}
"""Options that mean something below 0."""


def classes() -> Iterator[type]:
    for module in pkgutil.iter_modules(distributed_rerank.config.__path__):
        found = importlib.import_module(f"distributed_rerank.config.{module.name}")
        for _, kind in inspect.getmembers(found, inspect.isclass):
            if dataclasses.is_dataclass(kind) and kind.__module__ == found.__name__:
                yield kind


def numbers() -> Iterator[Any]:
    """(class, field, whether it takes several numbers, whether they are whole) of every option with a number."""
    for kind in classes():
        for field in dataclasses.fields(kind):
            words = str(typing.get_type_hints(kind)[field.name]).replace("typing.", "")
            is_number = any(word in words for word in ("int", "float")) and "Literal" not in words
            if is_number and "Config" not in words:
                several = words.startswith("tuple")
                yield pytest.param(kind, field.name, several, "float" not in words, id=f"{kind.__name__}.{field.name}")


def made(kind: Any, name: str, value: Any) -> Any:
    hints = typing.get_type_hints(kind)
    required = [f for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    return kind(**{field.name: REQUIRED.get(hints[field.name], ()) for field in required} | {name: value})


@pytest.mark.parametrize(("kind", "name", "several", "whole"), list(numbers()))
def test_a_number_below_zero_or_no_number_is_refused_by_name(kind: Any, name: str, several: bool, whole: bool) -> None:
    wrong: list[float] = [-1 if whole else -1.0] if f"{kind.__name__}.{name}" not in NEGATIVE else []
    wrong += [] if whole else [math.nan]
    for value in wrong:
        with pytest.raises(BadInput, match=name.replace("_", "[-_]")) as caught:
            made(kind, name, (value,) * 3 if several else value)
        assert "\n" not in str(caught.value)


def test_the_options_are_found() -> None:
    assert len(list(numbers())) > 60


def with_a_meaning_of_zero() -> Iterator[Any]:
    """(class, field, 0 or 0.0) of every option whose own text says what 0 does."""
    for kind in classes():
        hints = typing.get_type_hints(kind)
        body = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            words = text.value.value if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else ""
            if re.search(r"\b0\s+(=|freezes|never)", str(words)):
                name = field.target.id
                zero = 0.0 if "float" in str(hints[name]) else 0
                yield pytest.param(kind, name, zero, id=f"{kind.__name__}.{name}")


@pytest.mark.parametrize(("kind", "name", "zero"), list(with_a_meaning_of_zero()))
def test_a_zero_that_the_help_explains_is_accepted(kind: Any, name: str, zero: float) -> None:
    assert getattr(made(kind, name, zero), name) == zero


def test_the_zeros_are_found() -> None:
    found = {str(parameter.id) for parameter in with_a_meaning_of_zero()}
    fields = {"clip_norm", "backbone_lr", "remine_every", "patience", "loader_workers"}
    assert {f"TrainingConfig.{name}" for name in fields} <= found
    assert {"ClusterConfig.num_workers", "ServeConfig.port"} <= found


@pytest.mark.parametrize(
    ("kind", "values", "line"),
    [
        (ExtractorConfig, {"image_size": 0}, "image_size=0 must be at least 1 and finite"),
        (ExtractorConfig, {"image_size": (96, 0)}, r"image_size=\(96, 0\) must be at least 1"),
        (ExtractorConfig, {"std": (0.2, 0.2, 0.0)}, r"std=\(0.2, 0.2, 0.0\) must be above 0 and finite"),
        (TokenSiameseConfig, {"head_dropout": 1.5}, "head_dropout=1.5 must be at least 0 and at most 1"),
        (TokenSiameseConfig, {"depths": ()}, r"depths=\(\)"),
    ],
)
def test_the_line_has_the_value_and_the_range(kind: Any, values: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput, match=line):
        kind(**values)
