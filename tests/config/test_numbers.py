"""Every option with a number has a range: nobody trains with nan, or gets the default for an image size of 0."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
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
