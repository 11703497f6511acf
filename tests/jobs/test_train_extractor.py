"""jobs/train_extractor.py: weights that another job loads, and that really are the trained ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from job_files import EXTRACTOR
from safetensors.torch import load_file

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.models.saving import load_model

SMALL = ["--epochs", "2", "--n-labels", "4", "--n-instances", "3", "--n-items", "10", "--top-n", "8",
         "--warmup-steps", "1", "--backbone-lr", "0.001", "--num-workers", "1", "--patience", "0"]  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_trained_extractor_is_loaded_as_weights(
    catalogue_path: Path, run_job: Callable, ray_cluster: str, tmp_path: Path
) -> None:
    out = tmp_path / "extractor"
    outcome = run_job("train_extractor", "--catalogue", catalogue_path, "--out", out, *EXTRACTOR, *SMALL, on_ray=True)
    assert outcome.code == 0, outcome.errors
    weights = out / "extractor.safetensors"
    config = ExtractorConfig(name="test_resnet", weights=str(weights), image_size=32, resize="square", precision="fp32")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded = build_extractor(config).eval()(pixels)
        trained = load_model(out).extractor.eval()
        assert torch.allclose(loaded, trained(pixels), atol=2e-2)  # the model computes in bf16 where the CPU does
    untrained = build_extractor(ExtractorConfig(name="test_resnet", weights="none", image_size=32)).model.state_dict()
    moved = [name for name, value in load_file(weights).items() if not torch.equal(value, untrained[name])]
    assert any("conv" in name for name in moved)
    embedded = run_job(
        "embed", "--catalogue", catalogue_path, "--out", tmp_path / "e", *EXTRACTOR[:2], *EXTRACTOR[4:],
        "--extractor-weights", weights,
    )  # fmt: skip
    assert embedded.code == 0, embedded.errors
