"""Blocks of a vision transformer on CPUs with AMX or AVX-512 BF16, compiled from the folder `cpu`. Layer 1.

AMX multiplies bfloat16 numbers some ten times as fast as the vector units multiply float32. Here everything between two
products (norms, softmax, GELU, residual sums) runs beside them and stays in the caches, which makes a ViT-S/16 twice as
fast as by torch's bfloat16. Three accuracies:

- parts = 1: weights and activations are rounded to bfloat16, sums are float32. The class token has two parts all the
  same: nothing averages its rounding errors, and they would be nearly all of the error of a score.
- parts = 2: each number is the sum of two bfloat16 numbers, a product that of three of theirs. Errors are some 2^-16.
- parts = 3: each number is the sum of three, which hold all bits of a float32, a product that of six of theirs. Errors
  are those of float32: what is left out of a product is some 2^-25 of it (Henry et al. 2019, arXiv 1904.06376).

With AVX-512 BF16 alone parts = 1 is faster than torch's bfloat16, the others are slower than its float32.
A token's result has the same bits whatever else is in the call.
"""

import ctypes
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Float32, UInt8
from torch import Tensor

from distributed_rerank.kernels.library import UNIT, load_library, pointer


class _Linear(ctypes.Structure):
    _fields_ = (("weights", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Norm(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("norm1", "norm2")),
        *((name, _Linear) for name in ("qkv", "proj", "fc1", "fc2")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("dim", "heads", "hidden", "parts")),
    )


@dataclass(frozen=True)
class PackedLinear:
    """Weights as two or three parts in the order of the tiles, and the bias."""

    weights: BFloat16[Tensor, " number"]
    """All first parts, then all second parts, then the third ones if there are some."""
    bias: Float32[Tensor, " output"]

    def arguments(self) -> _Linear:
        """As the library takes it."""
        return _Linear(self.weights.data_ptr(), self.bias.data_ptr())


def split(x: Float32[Tensor, "row column"], parts: int) -> BFloat16[Tensor, "part row column"]:
    """Numbers as a sum of bfloat16 numbers: the rounding, then the rounding of what is left."""
    found: list[Tensor] = []
    for _ in range(parts):
        found.append(x.bfloat16())
        x = x - found[-1].float()
    return torch.stack(found)


def _weight_parts(parts: int) -> int:
    """In how many parts a layer's weights are packed: two at least, for the class token."""
    return max(2, parts)


def pack_linear(
    weight: Float[Tensor, "output input"], bias: Float[Tensor, " output"] | None, parts: int
) -> PackedLinear:
    """A linear layer x @ weight.T + bias, for a block of `parts`; both sizes must be multiples of 32."""
    n_outputs, n_inputs = weight.shape
    numbers = split(weight.detach().float(), _weight_parts(parts))
    # part, panel of 32 outputs, 32 inputs, 16 outputs of the panel; then pair of inputs, output, input of the pair
    tiles = numbers.reshape(-1, n_outputs // 32, 2, 16, n_inputs // 32, 16, 2).permute(0, 1, 4, 2, 5, 3, 6)
    no_bias = torch.zeros(n_outputs) if bias is None else bias.detach().float().contiguous()
    return PackedLinear(tiles.flatten().contiguous(), no_bias)


@dataclass(frozen=True)
class PackedBlock:
    """A block x + proj(attention(norm1(x))), then x + fc2(gelu(fc1(norm2(x)))), with layer norms and exact GELU."""

    norm1: tuple[Float32[Tensor, " dim"], Float32[Tensor, " dim"]]
    """Scale and shift."""
    norm2: tuple[Float32[Tensor, " dim"], Float32[Tensor, " dim"]]
    qkv: PackedLinear
    """Queries, keys and values, each head after head."""
    proj: PackedLinear
    fc1: PackedLinear
    fc2: PackedLinear
    eps: float
    """Of both norms."""
    n_heads: int
    parts: int
    """Of weights and activations, 1 to 3, and as the layers were packed; the class token's are 2 at least."""

    @property
    def dim(self) -> int:
        """Width of a token."""
        return len(self.norm1[0])

    def arguments(self) -> _Block:
        """As the library takes it; valid as long as this lives."""
        norms = (_Norm(scale.data_ptr(), shift.data_ptr()) for scale, shift in (self.norm1, self.norm2))
        linears = (linear.arguments() for linear in (self.qkv, self.proj, self.fc1, self.fc2))
        return _Block(*norms, *linears, self.eps, self.dim, self.n_heads, len(self.fc1.bias), self.parts)


def run_block(block: PackedBlock, tokens: Float32[Tensor, "image token dim"]) -> Float32[Tensor, "image token dim"]:
    """The block's output, the class token first, in the place of its input, which must be contiguous."""
    _run(block, tokens, is_last=False)
    return tokens


def run_last_block(block: PackedBlock, tokens: Float32[Tensor, "image token dim"]) -> Float32[Tensor, "image 1 dim"]:
    """The block's output for the first token of each image alone, in its place: a quarter of the cost."""
    _run(block, tokens, is_last=True)
    return tokens[:, :1]


def _run(block: PackedBlock, tokens: Float32[Tensor, "image token dim"], is_last: bool) -> None:
    n_images, n_tokens, dim = tokens.shape
    assert dim == block.dim, f"tokens have {dim} numbers, the block takes {block.dim}"
    assert tokens.is_contiguous(), "tokens are changed in place, so they must lie one after the other"
    if n_images == 0:
        return
    arguments = ctypes.byref(block.arguments())
    scratch = torch.empty(load_library().block_scratch(arguments, n_images, n_tokens), dtype=torch.uint8)
    load_library().run_block(arguments, pointer(tokens), n_images, n_tokens, int(is_last), pointer(scratch))


@dataclass(frozen=True)
class PackedPatches:
    """The patch embedding of images as bytes: (pixels / 255 - mean) / std and the convolution in one."""

    linear: PackedLinear
    size: int
    """Side of a patch, in pixels."""
    parts: int
    """Of a block that takes them."""


def pack_patches(
    kernel: Float[Tensor, "dim 3 size size"],
    bias: Float[Tensor, " dim"] | None,
    mean: Float[Tensor, "1 3 1 1"],
    std: Float[Tensor, "1 3 1 1"],
    parts: int,
) -> PackedPatches:
    """A convolution whose stride is its size, on images normalised by `mean` and `std`; dim a multiple of 32."""
    dim, _, size, _ = kernel.shape
    by_bytes = (kernel.detach().double() / (255 * std)).flatten(1).float()
    padded = torch.nn.functional.pad(by_bytes, (0, -by_bytes.shape[1] % UNIT))
    # The shift is that of the weights as they were rounded: so a byte at the mean has no rounding error.
    used = split(padded, _weight_parts(parts)).double().sum(dim=0)[:, : by_bytes.shape[1]]
    shift = (used.view(dim, 3, -1).sum(dim=2) * 255 * mean.view(1, 3)).sum(dim=1)
    whole = (torch.zeros(dim) if bias is None else bias.detach()).double() - shift
    return PackedPatches(pack_linear(padded, whole.float(), parts), size, parts)


def embed_patches(
    packed: PackedPatches, pixels: UInt8[Tensor, "image 3 height width"]
) -> Float32[Tensor, "image patch dim"]:
    """The patches row by row, without positions; a margin smaller than a patch is ignored. In two parts at least."""
    n_images, _, height, width = pixels.shape
    size, dim = packed.size, len(packed.linear.bias)
    out = torch.empty(n_images, (height // size) * (width // size), dim)
    if out.numel() == 0:
        return out
    pixels = pixels.contiguous()
    scratch = torch.empty(load_library().patches_scratch(height, width, size, dim), dtype=torch.uint8)
    linear = ctypes.byref(packed.linear.arguments())
    load_library().embed_patches(
        pointer(pixels), n_images, height, width, size, dim, linear, packed.parts, pointer(out), pointer(scratch)
    )
    return out
