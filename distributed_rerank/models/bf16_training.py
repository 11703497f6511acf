"""A transformer's operations for training in bfloat16 on a CPU, where torch's backward passes are slow. Layer 2.

The compiled kernels do what torch is slow at; without them it is only attention that can be helped.
"""

from typing import Any

import torch
from jaxtyping import BFloat16, Float, Float32
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional

from distributed_rerank.kernels import attention, library
from distributed_rerank.kernels import linear as linear_kernel
from distributed_rerank.kernels import norm as norm_kernel

Heads = BFloat16[Tensor, "image head token head_dim"]


def can_train(block: Any, tokens: Tensor) -> bool:
    """Whether this timm block, called with these tokens under the current autocast, may use what is here."""
    is_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    is_plain = block.attn.attn_drop.p == 0 and type(block.mlp) is Mlp
    return is_bf16 and is_plain and tokens.device.type == "cpu" and torch.is_grad_enabled()


def linear(layer: nn.Module, x: Float[Tensor, "*row input"]) -> BFloat16[Tensor, "*row output"]:
    """The layer's output, as under autocast."""
    return project(x, layer.weight, layer.bias) if type(layer) is nn.Linear else layer(x)


def project(
    x: Float[Tensor, "*row input"], weight: Float[Tensor, "output input"], bias: Float[Tensor, " output"] | None
) -> BFloat16[Tensor, "*row output"]:
    """x weight' + bias, as under autocast."""
    if weight.dtype == torch.float32 and _has_kernels(*weight.shape):
        return KernelLinear.apply(x, weight, bias)
    return functional.linear(x, weight, bias)


def norm(layer: nn.Module, x: Float32[Tensor, "*row dim"]) -> Float[Tensor, "*row dim"]:
    """The layer's output, in bfloat16 where the kernels compute it."""
    is_plain = isinstance(layer, nn.LayerNorm) and layer.bias is not None and len(layer.normalized_shape) == 1
    if is_plain and x.dtype == layer.weight.dtype == torch.float32 and _has_kernels(x.shape[-1]):
        return KernelNorm.apply(x, layer.weight, layer.bias, layer.eps)
    return layer(x)


def attend(
    projected: BFloat16[Tensor, "image token 3 head head_dim"], q_norm: nn.Module, k_norm: nn.Module
) -> BFloat16[Tensor, "image token dim"]:
    """softmax(q k' / sqrt(head_dim)) v of the normed queries and keys."""
    is_normed = not (isinstance(q_norm, nn.Identity) and isinstance(k_norm, nn.Identity))
    if _has_kernels(projected.shape[-1]) and not is_normed:
        return KernelAttention.apply(projected).flatten(2)
    q, k, v = projected.permute(2, 0, 3, 1, 4)
    out = ProductAttention.apply(q_norm(q).to(v.dtype), k_norm(k).to(v.dtype), v)
    return out.transpose(1, 2).flatten(2)


def _has_kernels(*widths: int) -> bool:
    return all(width % library.UNIT == 0 for width in widths) and library.why_unavailable() is None


class KernelLinear(torch.autograd.Function):
    """x weight' + bias with x and weight rounded to bfloat16; gradients of weight and bias are summed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*row input"],
        weight: Float32[Tensor, "output input"],
        bias: Float32[Tensor, " output"] | None,
    ) -> BFloat16[Tensor, "*row output"]:
        """As under autocast."""
        x_rounded, weight_rounded = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x_rounded, weight_rounded)
        return functional.linear(x_rounded, weight_rounded, None if bias is None else bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx: Any, *gradients: BFloat16[Tensor, "*row output"]) -> tuple[Tensor | None, ...]:
        """Of x, weight and bias."""
        x, weight = ctx.saved_tensors
        of_out = gradients[0].flatten(0, -2).contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        of_weight = of_bias = None
        if needs_weight or needs_bias:
            of_weight, of_bias = linear_kernel.gradients(x.flatten(0, -2).contiguous(), of_out, has_bias=needs_bias)
        return (of_out @ weight).view_as(x) if needs_x else None, of_weight, of_bias


class KernelNorm(torch.autograd.Function):
    """A layer norm of float32 rows, rounded to bfloat16 as what comes next takes it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float32[Tensor, "*row dim"],
        scale: Float32[Tensor, " dim"],
        shift: Float32[Tensor, " dim"],
        eps: float,
    ) -> BFloat16[Tensor, "*row dim"]:
        """The normed rows."""
        x = x.contiguous()
        out, statistics = norm_kernel.norm(x, scale, shift, eps)
        ctx.save_for_backward(x, statistics, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: BFloat16[Tensor, "*row dim"]) -> tuple[Tensor, Tensor, Tensor, None]:
        """Of x, scale and shift."""
        x, statistics, scale = ctx.saved_tensors
        return *norm_kernel.gradients(x, statistics, scale, gradients[0].contiguous()), None


class KernelAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(head_dim)) v by the compiled kernels: nothing is copied, of weights only sums are kept."""

    @staticmethod
    def forward(ctx: Any, projected: attention.Projected) -> attention.Output:
        """The outputs of contiguous queries, keys and values; no mask and no dropout."""
        out, logs = attention.attend(projected)
        ctx.save_for_backward(projected, out, logs)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: attention.Output) -> attention.Projected:
        """Of queries, keys and values."""
        projected, out, logs = ctx.saved_tensors
        return attention.gradients(projected, out, logs, gradients[0].contiguous())


class ProductAttention(torch.autograd.Function):
    """The same by batched products, whose weights are kept for the backward pass.

    torch's fused kernel keeps them not and computes them again, in small products: with two threads its backward pass
    takes five times as long as these. Costs image x head x token x token x 2 bytes for each block.
    """

    @staticmethod
    def forward(ctx: Any, q: Heads, k: Heads, v: Heads) -> Heads:
        """The outputs, head by head; no mask and no dropout."""
        scaled = q * q.shape[-1] ** -0.5
        weights = (scaled @ k.transpose(-1, -2)).softmax(dim=-1)
        ctx.save_for_backward(scaled, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, *gradients: Heads) -> tuple[Heads, Heads, Heads]:
        """Of q, k and v."""
        (gradient,) = gradients
        scaled, k, v, weights = ctx.saved_tensors
        of_weights = gradient @ v.transpose(-1, -2)
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_q = of_scores @ k * scaled.shape[-1] ** -0.5
        return of_q, of_scores.transpose(-1, -2) @ scaled, weights.transpose(-1, -2) @ gradient
