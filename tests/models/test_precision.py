import pytest
import torch
from torch import nn

from distributed_rerank.errors import BadInput
from distributed_rerank.models.precision import bf16_support, computing_in, resolve_precision

CPU = torch.device("cpu")


def test_resolve_precision_fp32_is_float32_everywhere():
    assert resolve_precision("fp32", CPU) == torch.float32


def test_resolve_precision_auto_follows_the_flags_of_the_cpu():
    flags = torch.cpu.get_capabilities()
    native = bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))
    assert (resolve_precision("auto", CPU) == torch.bfloat16) == native
    assert (bf16_support(CPU) is not None) == native


def test_resolve_precision_bf16_is_native_or_refused_with_the_reason():
    if bf16_support(CPU):
        assert resolve_precision("bf16", CPU) == torch.bfloat16
    else:
        with pytest.raises(BadInput, match="80 times slower; use auto or fp32"):
            resolve_precision("bf16", CPU)


def test_resolve_precision_bf16_on_a_device_that_emulates_it_is_refused():
    with pytest.raises(BadInput, match="precision=bf16"):
        resolve_precision("bf16", torch.device("mps"))


def test_resolve_precision_on_the_meta_device_is_float32_whatever_is_installed():
    """It serves to count operations: those of a job that other machines are to run."""
    assert resolve_precision("bf16", torch.device("meta")) == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_resolve_precision_auto_on_a_new_gpu_is_bf16():
    device = torch.device("cuda")
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    assert (resolve_precision("auto", device) == torch.bfloat16) == native


def test_computing_in_casts_by_autocast_only_where_parameters_are_float32():
    x = torch.randn(2, 4)
    with computing_in(torch.bfloat16, (linear := nn.Linear(4, 3)), CPU) as dtype:
        assert dtype == torch.float32
        assert linear(x).dtype == torch.bfloat16
    with computing_in(torch.bfloat16, (cast := nn.Linear(4, 3).bfloat16()), CPU) as dtype:
        assert dtype == torch.bfloat16
        assert cast(x.to(dtype)).dtype == torch.bfloat16
