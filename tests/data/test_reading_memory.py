"""Reading a catalogue's table takes little more than the table: peak memory of fresh processes at two sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "_reading.py"
SMALL, LARGE = 1_000_000, 4_000_000
"""Images: growth shows between them, and not the 35 MB by which peaks of one size differ on a busy machine."""
MOST_BYTES = 20.0
"""An image, of the peak beyond what stays; it was some 310 when whole columns were looked at together."""


def _beyond(n_images: int, form: str, order: str) -> float:
    size = json.dumps({"n_images": n_images, "form": form, "order": order})
    done = subprocess.run([sys.executable, SCRIPT, size], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["beyond_bytes"] * n_images


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's")
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_reading_grows_little_beyond_the_table(form: str, order: str) -> None:
    small, large = (_beyond(n_images, form, order) for n_images in (SMALL, LARGE))
    assert (large - small) / (LARGE - SMALL) < MOST_BYTES, f"{small} to {large} bytes"
