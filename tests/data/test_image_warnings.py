"""How many lines many odd images give."""

import logging
from typing import Any

import pytest

from distributed_rerank.data import image_warnings


def _tell(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, names: list[str]) -> list[Any]:
    monkeypatch.setattr(image_warnings, "_seen", set())
    with caplog.at_level(logging.WARNING):
        for name in names:
            image_warnings._tell(name, "odd")
    return [record.getMessage() for record in caplog.records]


def test_each_of_ten_images_has_one_line_then_powers_of_ten_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = [str(n) for n in range(1, 2001)]
    lines = _tell(monkeypatch, caplog, [*names, *names])
    assert lines == [
        *(f"'{n}': odd; its pixels are used" for n in range(1, 11)),
        *(f"{n} images with such warnings so far; the last one is '{n}': odd" for n in (100, 1000)),
    ]
