"""Forward pass of plain vision transformers from timm, for images of any size.

It differs from timm's: the position table keeps its trained size and is resampled in each forward as in DINO and OML,
so that state dicts fit in both directions; the last block is computed for the class token only; the number of keys may
be padded to a multiple of 16 where that is faster. Each is exact up to rounding.

The residual stream has the number format of the norms. Where these stay float32 in a bfloat16 network, the sums over
the blocks are not rounded to 8 bits, which halves the error of the scores.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Num
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distributed_rerank.models import packing
from distributed_rerank.models.rows import in_whole_tiles
from distributed_rerank.tensors.hardware import bf16_support


def is_plain_vit(model: nn.Module) -> bool:
    """Whether this module can run `model`: a timm ViT with class token, square position table and ordinary blocks."""
    if type(model) is not VisionTransformer or model.pos_embed is None or not model.has_class_token:
        return False
    if type(model.patch_embed) is not PatchEmbed:  # a hybrid's first layers are a CNN
        return False
    n_patch_positions = position_table(model)[1].shape[1]
    return (
        model.global_pool == "token"
        and getattr(model, "attn_pool", None) is None
        and math.isqrt(n_patch_positions) ** 2 == n_patch_positions
        and all(_is_ordinary(block) for block in model.blocks)
    )


def _is_ordinary(block: nn.Module) -> bool:
    return type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None


def cast(vit: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Cast `vit` to `dtype` for inference, in place; in bfloat16 on a CPU with packed layers the norms stay float32.

    float32 norms cost nothing measurable there. Without AMX, attention in bfloat16 is 1.6 times faster with oneDNN's
    batched products than with torch's fused kernel, which multiplies in small tiles.
    """
    # A layer that is not packed accepts only its own format, so the norms must then have it too.
    are_packed = packing.can_pack() and all(packing.packs(block) for block in vit.blocks)
    if device.type != "cpu" or dtype != torch.bfloat16 or not are_packed:
        vit.to(dtype)
        return
    norms = [vit.norm, vit.fc_norm, *(norm for block in vit.blocks for norm in (block.norm1, block.norm2))]
    kept = {id(parameter) for norm in norms for parameter in norm.parameters()}
    for tensor in (*vit.parameters(), *vit.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.to(dtype)
    for block in vit.blocks:
        block.attn.fused_attn = bf16_support(device) == "AMX"


def read_weights(vit: Any) -> tuple[nn.Module, ...]:
    """The layers of which this module reads the weights instead of calling them."""
    return (vit.blocks[-1].attn.qkv,)


def position_table(vit: Any) -> tuple[Tensor, Tensor]:
    """The position table split into prefix tokens [1, prefix or 0, dim] and patches [1, patch, dim]."""
    n_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    return vit.pos_embed[:, :n_prefix], vit.pos_embed[:, n_prefix:]


def resample_positions(patches: Float[Tensor, "1 old dim"], grid: tuple[int, int]) -> Float[Tensor, "1 new dim"]:
    """A square table of patch positions resampled to `grid` (rows, columns) as in DINO's reference code and OML.

    Bicubic without antialiasing; the interpolation gets a scale factor, that of the wanted size plus 0.1, instead of
    the size (https://github.com/facebookresearch/dino/issues/8). timm's own resampling would change the scores.
    """
    side = math.isqrt(patches.shape[1])
    if grid == (side, side):
        return patches
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    resampled = functional.interpolate(image, scale_factor=scale, mode="bicubic")
    assert resampled.shape[-2:] == grid, f"positions resampled to {tuple(resampled.shape[-2:])} instead of {grid}"
    return resampled.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(patches.dtype)


def positions_at(vit: Any, grid: tuple[int, int]) -> Float[Tensor, "1 patch dim"]:
    """The patch positions of images with this grid; stored for later calls after `keep_positions`."""
    kept = getattr(vit, "kept_positions", None)
    if kept is None:
        return resample_positions(position_table(vit)[1], grid)
    if grid not in kept:
        kept[grid] = resample_positions(position_table(vit)[1], grid)
    return kept[grid]


def keep_positions(vit: Any) -> None:
    """From now on resample the table once for each grid; the table must not change any more."""
    vit.kept_positions = {}


def embed_patches(vit: Any, pixels: Num[Tensor, "image 3 height width"]) -> Float[Tensor, "image patch dim"]:
    """Patch embeddings without positions, row by row. A margin smaller than a patch is ignored."""
    if pixels.is_cuda:
        return vit.patch_embed.norm(project_patches(vit.patch_embed.proj, pixels))
    return vit.patch_embed.norm(vit.patch_embed.proj(pixels).flatten(2).transpose(1, 2))


def project_patches(conv: nn.Conv2d, pixels: Num[Tensor, "image 3 height width"]) -> Float[Tensor, "image patch dim"]:
    """`conv`, whose stride is its kernel's size, as one matrix product; cuDNN's own is ten times slower on an H100."""
    (high, wide), (height, width) = conv.kernel_size, pixels.shape[-2:]
    rows, columns = height // high, width // wide
    # [image, 3, row, high, column, wide] -> [image, row, column, 3, high, wide] -> [image, patch, 3 * high * wide]
    cut = pixels[..., : rows * high, : columns * wide].unflatten(3, (columns, wide)).unflatten(2, (rows, high))
    patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return functional.linear(patches, conv.weight.flatten(1), conv.bias)


def add_prefix(vit: Any, patches: Tensor, positions: Tensor) -> Float[Tensor, "image token dim"]:
    """Prefix tokens (class token first) with their positions, then `patches` + `positions`."""
    n = patches.shape[0]
    prefix = [vit.cls_token] + ([vit.reg_token] if vit.reg_token is not None else [])
    prefix_tokens = torch.cat(prefix, dim=1)
    if not vit.no_embed_class:
        prefix_tokens = prefix_tokens + position_table(vit)[0]
    tokens = torch.cat(
        [prefix_tokens.expand(n, -1, -1).to(patches.dtype), patches + positions.to(patches.dtype)], dim=1
    )
    return vit.norm_pre(vit.patch_drop(vit.pos_drop(tokens)))


def patch_grid(vit: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches in an image."""
    patch_height, patch_width = vit.patch_embed.patch_size
    return height // patch_height, width // patch_width


def embed(vit: Any, pixels: Num[Tensor, "image 3 height width"]) -> Float[Tensor, "image token dim"]:
    """The tokens that enter the first block."""
    positions = positions_at(vit, patch_grid(vit, *pixels.shape[-2:]))
    return add_prefix(vit, embed_patches(vit, pixels), positions)


def class_token_embedding(
    vit: Any, pixels: Num[Tensor, "image 3 height width"], pad_keys: bool
) -> Float[Tensor, "image dim"]:
    """The normalised class token after all blocks, as from timm's ViT with num_classes=0 and global_pool="token"."""
    return forward_from_block(vit, embed(vit, pixels), first_block=0, pad_keys=pad_keys)


def maps_and_embedding(
    vit: Any, pixels: Num[Tensor, "image 3 height width"], blocks: Sequence[int]
) -> tuple[list[Float[Tensor, "image dim rows columns"]], Float[Tensor, "image dim"]]:
    """Maps of the patch tokens after `blocks` (negative = from the end), through the final norm, and the embedding."""
    wanted = [range(len(vit.blocks))[block] for block in blocks]
    rows, columns = patch_grid(vit, *pixels.shape[-2:])
    tokens, maps = to_residual_dtype(vit, embed(vit, pixels)), {}
    for number, block in enumerate(vit.blocks):
        tokens = run_block(vit, block, tokens)
        if number in wanted:
            patches = vit.norm(tokens)[:, vit.num_prefix_tokens :]
            # A copy: without a final norm these are the tokens themselves, and the next block may change them in place.
            maps[number] = patches.transpose(1, 2).clone().unflatten(2, (rows, columns))
    return [maps[number] for number in wanted], vit.head_drop(vit.fc_norm(vit.norm(tokens)[:, 0]))


def forward_from_block(
    vit: Any, tokens: Float[Tensor, "image token dim"], first_block: int, pad_keys: bool
) -> Float[Tensor, "image dim"]:
    """Run the blocks from `first_block` on and return the normalised class token. `tokens` may be overwritten."""
    blocks, tokens = list(vit.blocks)[first_block:], to_residual_dtype(vit, tokens)
    if blocks:
        tokens, mask = _pad_keys(tokens) if pad_keys else (tokens, None)
        for block in blocks[:-1]:
            tokens = run_block(vit, block, tokens, mask)
        tokens = _class_token_block(blocks[-1], tokens, mask)  # the last block needs no other token
    return vit.head_drop(vit.fc_norm(vit.norm(tokens)[:, 0]))


def first_blocks(
    vit: Any, pixels: Num[Tensor, "image 3 height width"], n_blocks: int
) -> Float[Tensor, "image token dim"]:
    """All tokens after the first `n_blocks`."""
    tokens = to_residual_dtype(vit, embed(vit, pixels))
    for block in vit.blocks[:n_blocks]:
        tokens = run_block(vit, block, tokens)
    return tokens


def to_residual_dtype(vit: Any, tokens: Tensor) -> Tensor:
    """The tokens in the format of the residual stream, which is that of the norms."""
    return tokens.to(vit.blocks[0].norm1.weight.dtype)


def run_block(vit: Any, block: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """One block; with timm's switch for checkpointing its activations are not stored for the backward pass."""
    is_trained = torch.is_grad_enabled() and (
        tokens.requires_grad or any(parameter.requires_grad for parameter in block.parameters())
    )
    if not is_trained:
        return block(tokens, attn_mask=mask)
    run = partial(block, attn_mask=mask)
    return checkpoint(run, tokens, use_reentrant=False) if vit.grad_checkpointing else run(tokens)


def _pad_keys(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens with zeros appended up to a multiple of 16, and the mask [1, 1, 1, token] that hides these, if any."""
    n_missing = -tokens.shape[1] % 16
    if n_missing == 0:
        return tokens, None
    mask = torch.zeros(1, 1, 1, tokens.shape[1] + n_missing, dtype=tokens.dtype, device=tokens.device)
    mask[..., -n_missing:] = -math.inf
    return functional.pad(tokens, (0, 0, 0, n_missing)), mask


def _class_token_block(block: Any, tokens: Tensor, mask: Tensor | None) -> Float[Tensor, "image 1 dim"]:
    """The class token after a block: keys and values of all tokens, everything else for the class token alone."""
    attention, n = block.attn, tokens.shape[0]
    heads, head_dim = attention.num_heads, attention.head_dim
    width = heads * head_dim
    # The rows of qkv's weight are those of queries, keys and values, `width` each.
    weight, bias = attention.qkv.weight, attention.qkv.bias
    normed = block.norm1(tokens).to(weight.dtype)
    kv = in_whole_tiles(partial(functional.linear, weight=weight[width:], bias=_part(bias, width, None)), normed)
    q = in_whole_tiles(partial(functional.linear, weight=weight[:width], bias=_part(bias, 0, width)), normed[:, :1])
    # q [image, head, 1, head_dim]; k and v [image, head, token, head_dim].
    q = attention.q_norm(q.reshape(n, 1, heads, head_dim).transpose(1, 2))
    k, v = kv.reshape(n, -1, 2, heads, head_dim).permute(2, 0, 3, 1, 4)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = functional.scaled_dot_product_attention(q, attention.k_norm(k), v, attn_mask=mask, dropout_p=dropout)
    out = out.transpose(1, 2).reshape(n, 1, width)
    out = attention.norm(out) if hasattr(attention, "norm") else out
    out = attention.proj_drop(in_whole_tiles(attention.proj, out))
    token = tokens[:, :1] + block.drop_path1(block.ls1(out))
    return token + block.drop_path2(block.ls2(in_whole_tiles(block.mlp, block.norm2(token))))


def _part(bias: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    return None if bias is None else bias[start:stop]
