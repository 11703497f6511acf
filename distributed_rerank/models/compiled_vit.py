"""Plain vision transformers on the compiled kernels: blocks and patch embedding swapped in place. Layer 2."""

from typing import Any

from jaxtyping import Float32, UInt8
from timm.layers.activations import GELU
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from distributed_rerank.kernels import library, transformer


def can_run(vit: Any) -> bool:
    """Whether the kernels compute what this timm vision transformer does: layer norms, plain attention, an MLP with
    exact GELU, layer scales or none, and widths that are multiples of 32."""
    projection = vit.patch_embed.proj
    return all(_is_supported(block) for block in vit.blocks) and (
        type(projection) is nn.Conv2d
        and projection.in_channels == 3
        and projection.kernel_size == projection.stride == (projection.kernel_size[0],) * 2
        and projection.padding == (0, 0)
        and projection.out_channels % library.UNIT == 0
    )


def _is_supported(block: Any) -> bool:
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    attention: Any = block.attn
    mlp: Any = block.mlp
    norms = (block.norm1, block.norm2)
    absent = (attention.q_norm, attention.k_norm, getattr(attention, "norm", nn.Identity()), mlp.norm)
    scales = (block.ls1, block.ls2)
    return bool(
        all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
        and block.norm1.eps == block.norm2.eps
        and all(type(module) is nn.Identity for module in absent)
        and all(type(scale) in (nn.Identity, LayerScale) for scale in scales)
        and getattr(attention, "gate", None) is None
        and all(type(linear) is nn.Linear for linear in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2))
        and (type(mlp.act) is GELU or (type(mlp.act) is nn.GELU and mlp.act.approximate == "none"))
        and attention.num_heads * attention.head_dim == attention.proj.out_features
        and attention.head_dim % library.UNIT == 0
        and mlp.fc1.out_features % library.UNIT == 0
    )


def prepare(vit: Any, mean: Float32[Tensor, "1 3 1 1"], std: Float32[Tensor, "1 3 1 1"], parts: int) -> None:
    """Swap the blocks and the patch embedding of a float32 network in place, for inference on the CPU.

    Afterwards the network takes the pixels as bytes: normalising by `mean` and `std` is part of the patch embedding.
    `parts` as in `kernels.transformer`. The new modules cannot be trained, saved or moved.
    """
    vit.blocks = nn.ModuleList(CompiledBlock(block, parts) for block in vit.blocks)
    vit.patch_embed.proj = CompiledPatches(vit.patch_embed.proj, mean, std, parts)


class CompiledBlock(nn.Module):
    """A timm block with its layer scales inside the weights. Works on float32 tokens in their place."""

    def __init__(self, block: Any, parts: int) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.norm2 = block.norm2
        self._packed = transformer.PackedBlock(
            norm1=_vectors(block.norm1),
            norm2=_vectors(block.norm2),
            qkv=_packed(block.attn.qkv, nn.Identity(), parts),
            proj=_packed(block.attn.proj, block.ls1, parts),
            fc1=_packed(block.mlp.fc1, nn.Identity(), parts),
            fc2=_packed(block.mlp.fc2, block.ls2, parts),
            eps=block.norm1.eps,
            n_heads=block.attn.num_heads,
            parts=parts,
        )

    def forward(
        self, tokens: Float32[Tensor, "image token dim"], attn_mask: None = None
    ) -> Float32[Tensor, "image token dim"]:
        """The block's output, in the memory of its input."""
        assert attn_mask is None, "the kernels need no padding, so there is nothing to mask"
        return transformer.run_block(self._packed, tokens)

    def class_token(self, tokens: Float32[Tensor, "image token dim"]) -> Float32[Tensor, "image 1 dim"]:
        """The output for the class token alone."""
        return transformer.run_last_block(self._packed, tokens)


class CompiledPatches(nn.Module):
    """A ViT's patch convolution on images as bytes."""

    def __init__(self, convolution: nn.Conv2d, mean: Tensor, std: Tensor, parts: int) -> None:
        super().__init__()
        self._packed = transformer.pack_patches(convolution.weight, convolution.bias, mean, std, parts)

    def forward(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Float32[Tensor, "image dim row column"]:
        """As the convolution of the normalised images."""
        n_columns = pixels.shape[3] // self._packed.size
        patches = transformer.embed_patches(self._packed, pixels)
        return patches.transpose(1, 2).unflatten(2, (-1, n_columns))


def _vectors(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight.detach().contiguous(), norm.bias.detach().contiguous()


def _packed(linear: nn.Linear, scale: nn.Module, parts: int) -> transformer.PackedLinear:
    """The layer followed by its layer scale, if there is one."""
    weight, bias = linear.weight.detach(), linear.bias
    if isinstance(scale, LayerScale):
        gamma = scale.gamma.detach()
        weight, bias = weight * gamma[:, None], None if bias is None else bias.detach() * gamma
    return transformer.pack_linear(weight, bias, parts)
