"""Attention, linear layers and norms of training against float64's autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distributed_rerank.kernels import attention, library, linear, norm

pytestmark = pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))

ROUNDING = 2.0**-9
"""Of a number to bfloat16, relative, at most."""


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def attention_in_float64(projected: Tensor, of_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logarithms of the sums, and the gradient of `projected`."""
    exact = projected.double().requires_grad_()
    q, k, v = exact.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    out = (scores.softmax(dim=-1) @ v).transpose(1, 2)
    out.backward(of_out.double())
    assert exact.grad is not None
    return out.detach(), scores.detach().logsumexp(dim=-1) / torch.tensor(2.0, dtype=torch.float64).log(), exact.grad


@pytest.mark.parametrize("n_tokens", [1, 2, 16, 31, 33, 197])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (3, 32), (2, 96)])
@pytest.mark.parametrize(("scale", "roundings"), [(0.1, 3), (1.5, 5), (4.0, 20)])
def test_attention_and_its_gradients_match_float64(n_tokens, heads, head_dim, scale, roundings):
    torch.manual_seed(n_tokens)
    projected = (torch.randn(2, n_tokens, 3, heads, head_dim) * scale).bfloat16()
    of_out = torch.randn(2, n_tokens, heads, head_dim).bfloat16()
    out, logs, of_projected = attention_in_float64(projected, of_out)
    found, found_logs = attention.attend(projected)
    assert relative_error(found, out) < 2 * ROUNDING
    torch.testing.assert_close(found_logs.double(), logs, rtol=1e-5, atol=1e-3)
    gradient = attention.gradients(projected, found, found_logs, of_out)
    # Of q and k it is made of differences, which are small against the rounded `out` in them where one token has all
    # the weight.
    for part, n_roundings in enumerate((roundings, roundings, 3)):
        exact, error = of_projected[:, :, part], (gradient[:, :, part].double() - of_projected[:, :, part]).norm()
        assert error < n_roundings * ROUNDING * max(exact.norm(), 0.2 * of_projected.norm())


def test_attention_of_an_image_has_the_same_bits_whoever_shares_the_call(threads):
    torch.manual_seed(0)
    projected, of_out = torch.randn(5, 45, 3, 2, 32).bfloat16(), torch.randn(5, 45, 2, 32).bfloat16()
    out, logs = attention.attend(projected)
    gradient = attention.gradients(projected, out, logs, of_out)
    for image in range(5):
        part = slice(image, image + 1)
        alone, alone_logs = attention.attend(projected[part])
        assert torch.equal(alone, out[part])
        assert torch.equal(attention.gradients(projected[part], alone, alone_logs, of_out[part]), gradient[part])


def test_attention_takes_contiguous_tensors_only():
    projected = torch.randn(2, 8, 3, 2, 32).bfloat16()
    with pytest.raises(AssertionError, match="one after the other"):
        attention.attend(projected.transpose(0, 1))
    out, logs = attention.attend(projected)
    with pytest.raises(AssertionError, match="one after the other"):
        attention.gradients(projected, out, logs, out.transpose(2, 3).contiguous().transpose(2, 3))


def test_attention_of_no_image():
    out, logs = attention.attend(torch.empty(0, 7, 3, 2, 32, dtype=torch.bfloat16))
    assert out.shape == (0, 7, 2, 32)
    assert logs.shape == (0, 2, 7)


@pytest.mark.parametrize("n_rows", [1, 31, 384, 385, 1000])
@pytest.mark.parametrize(("n_outputs", "n_inputs"), [(32, 32), (96, 32), (32, 160), (384, 96)])
def test_linear_gradients_match_float64(n_rows, n_outputs, n_inputs, threads):
    torch.manual_seed(n_rows)
    x, of_out = torch.randn(n_rows, n_inputs).bfloat16(), torch.randn(n_rows, n_outputs).bfloat16()
    of_weight, of_bias = linear.gradients(x, of_out, has_bias=True)
    torch.testing.assert_close(of_weight.double(), of_out.double().T @ x.double(), rtol=0, atol=1e-6 * n_rows)
    torch.testing.assert_close(of_bias.double(), of_out.double().sum(dim=0), rtol=0, atol=1e-6 * n_rows)
    assert linear.gradients(x, of_out, has_bias=False)[1] is None


def test_linear_gradients_have_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    before, found = torch.get_num_threads(), []
    for n_outputs, n_inputs in ((224, 96), (96, 224)):
        x, of_out = torch.randn(900, n_inputs).bfloat16(), torch.randn(900, n_outputs).bfloat16()
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            found.append(linear.gradients(x, of_out, has_bias=True))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        found.clear()
    torch.set_num_threads(before)


def test_linear_gradients_of_no_row_are_zero_and_odd_widths_are_refused():
    of_weight, of_bias = linear.gradients(torch.empty(0, 64).bfloat16(), torch.empty(0, 32).bfloat16(), has_bias=True)
    assert torch.equal(of_weight, torch.zeros(32, 64))
    assert torch.equal(of_bias, torch.zeros(32))
    with pytest.raises(AssertionError, match="multiple of 32"):
        linear.gradients(torch.zeros(4, 40).bfloat16(), torch.zeros(4, 32).bfloat16(), has_bias=True)


@pytest.mark.parametrize("n_rows", [1, 255, 256, 1000])
@pytest.mark.parametrize("dim", [32, 96, 384])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_norm_and_its_gradients_match_float64(n_rows, dim, offset, threads):
    torch.manual_seed(n_rows)
    x, scale, shift = torch.randn(n_rows, dim) * 2 + offset, torch.rand(dim) + 0.5, torch.randn(dim)
    of_out = torch.randn(n_rows, dim).bfloat16()
    exact = [tensor.double().requires_grad_() for tensor in (x, scale, shift)]
    out = functional.layer_norm(exact[0], (dim,), exact[1], exact[2], 1e-6)
    out.backward(of_out.double())
    found, statistics = norm.norm(x, scale, shift, 1e-6)
    assert relative_error(found, out.detach()) < ROUNDING
    torch.testing.assert_close(statistics[:, 0].double(), x.double().mean(dim=1), rtol=1e-6, atol=1e-6)
    for tensor, gradient in zip(exact, norm.gradients(x, statistics, scale, of_out), strict=True):
        assert tensor.grad is not None
        assert relative_error(gradient, tensor.grad) < 1e-6 * (1 + offset)


def test_norm_has_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    x, scale, shift, of_out = torch.randn(1500, 64), torch.rand(64), torch.randn(64), torch.randn(1500, 64).bfloat16()
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        out, statistics = norm.norm(x, scale, shift, 1e-6)
        found.append((out, statistics, *norm.gradients(x, statistics, scale, of_out)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_norm_of_constant_rows_stays_finite():
    x = torch.full((3, 32), 5.0)
    out, statistics = norm.norm(x, torch.ones(32), torch.zeros(32), 1e-6)
    assert torch.equal(out, torch.zeros(3, 32).bfloat16())
    assert norm.gradients(x, statistics, torch.ones(32), out)[0].isfinite().all()
