"""How many unreadable images a run accepts, and what it says of them."""

import logging

import pytest

from distributed_rerank.data.rejects import OUTAGE, Reject, check_rejects
from distributed_rerank.errors import BadInput


def rejects(count: int, reason: str = "damaged or truncated: x") -> list[Reject]:
    return [Reject(f"id{number}", "a.jpg", reason) for number in range(count)]


@pytest.mark.parametrize(
    ("n_rejects", "n_images", "max_rejects", "is_accepted"),
    [
        (5, 100, None, True), (6, 100, None, False), (6, 600, None, True), (7, 600, None, False), (5, 10, None, True),
        (5, 9, None, False), (2, 2, None, False), (1, 2, None, True), (1, 1, None, False), (0, 0, None, True),
        (1, 100, 0.0, False), (50, 100, 0.5, True), (51, 100, 0.5, False), (100, 100, 1.0, True),
    ],
)  # fmt: skip
def test_few_rejects_are_accepted_and_told(
    n_rejects: int, n_images: int, max_rejects: float | None, is_accepted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    if is_accepted:
        check_rejects(rejects(n_rejects), n_images, max_rejects, "rejects.parquet")
        assert ("AND ARE LEFT OUT (id0: damaged" in caplog.text) == bool(n_rejects)
        return
    with pytest.raises(BadInput, match=rf"^{n_rejects} of {n_images} images .*id0: damaged"):
        check_rejects(rejects(n_rejects), n_images, max_rejects, "rejects.parquet")


def test_store_that_was_away_leaves_no_image_out_unless_asked() -> None:
    found = rejects(1, f"{OUTAGE}: curlCode 7")
    with pytest.raises(BadInput, match="start the same command again when it does"):
        check_rejects(found, 1000, None, "rejects.parquet")
    check_rejects(found, 1000, 0.01, "rejects.parquet")
