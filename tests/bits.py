"""Are results the same to the last bit, whatever else is in their batch?

So they are on CPUs where a matrix product gives a row the same bits with few rows beside it as with many: AMD's with
AVX-512. On a GPU, on an AMD without AVX-512, and in a ViT on an Intel Xeon, products of other sizes are summed up in
another order, which changes the last bits. A stored encoding may then be rounded the other way; a ten-thousandth is
what is promised there.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

CPU_INFO = Path("/proc/cpuinfo")


def batches_show() -> bool:
    """Whether the bits of a row depend on the rows beside it, in products like those of a small network."""
    if torch.cuda.is_available() or (CPU_INFO.exists() and "GenuineIntel" in CPU_INFO.read_text()):
        return True
    generator = torch.Generator().manual_seed(0)
    for width in (27, 64, 512):
        rows, weights = (torch.randn(n, width, generator=generator) for n in (40, 96))
        together = rows @ weights.T
        if any(not torch.equal(rows[:n] @ weights.T, together[:n]) for n in (1, 2, 3, 8)):
            return True
    return False


BATCHES_SHOW = batches_show()


def assert_same(found: Any, expected: Any) -> None:
    """Equal float32 numbers: to the last bit where that is promised, else to a ten-thousandth."""
    found, expected = (
        x.float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32) for x in (found, expected)
    )
    if BATCHES_SHOW:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def assert_same_matches(found: Any, expected: Any) -> None:
    """The same candidates in the same order, with the same numbers as far as `assert_same` asks."""
    assert [match.id for match in found] == [match.id for match in expected]
    for number in ("distance", "probability"):
        assert_same(*([getattr(match, number) for match in matches] for matches in (found, expected)))
