"""Are results the same to the last bit, whatever else is in their batch?

So they are on the CPUs of AMD. On a GPU, and in a ViT on an Intel Xeon, matrix products of other sizes are summed up in
another order, which changes the last bits; a hundred-thousandth is what is promised there.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

CPU_INFO = Path("/proc/cpuinfo")
BATCHES_SHOW = torch.cuda.is_available() or (CPU_INFO.exists() and "GenuineIntel" in CPU_INFO.read_text())


def assert_same(found: Any, expected: Any) -> None:
    """Equal float32 numbers: to the last bit where that is promised, else to a hundred-thousandth."""
    found, expected = (
        x.float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32) for x in (found, expected)
    )
    if BATCHES_SHOW:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
