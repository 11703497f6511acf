"""The compiled blocks and patch embedding against timm's and torch's own in float64.

Errors are in units of the standard deviation of the exact output. Each tolerance is some three times the largest error
that was measured over all shapes here.
"""

import copy
import ctypes
import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional

from distributed_rerank.kernels import library, transformer
from distributed_rerank.kernels.library import load_library, pointer

NEEDS_KERNELS = pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

# dim, heads, hidden, whether queries, keys and values have a bias
SHAPES = [
    (64, 2, 256, True),  # heads of 32
    (384, 6, 1536, True),  # ViT-S: heads of 64 in two groups of three, hidden units in four pieces of 384
    (192, 2, 768, False),  # heads of 96
    (256, 4, 1024, False),  # four heads: a group of three and one of one; the last piece of hidden units is not full
    (64, 1, 416, True),  # hidden units: a full piece and one of 32
    (320, 5, 64, False),  # a group of three heads and one of two, fewer hidden units than inputs
]
# Around the edges of tiles (16) and blocks (32), and those of images of 112 and 224 px.
N_TOKENS = [1, 2, 15, 16, 17, 32, 33, 50, 197]


def random_block(dim: int, n_heads: int, hidden: int, qkv_bias: bool = True, eps: float = 1e-6) -> Block:
    """A block in which every parameter matters: attention is far from even, and so are norms from the identity."""
    norm = functools.partial(torch.nn.LayerNorm, eps=eps)
    block = Block(dim, n_heads, mlp_ratio=hidden / dim, qkv_bias=qkv_bias, norm_layer=norm).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(dim + n_heads)
    for name, parameter in block.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.copy_(noise / math.sqrt(parameter.shape[1]))
        else:
            parameter.copy_(0.3 * noise + (1 if name in ("norm1.weight", "norm2.weight") else 0))
    return block


def zero_block(dim: int, n_heads: int, hidden: int) -> Block:
    block = Block(dim, n_heads, mlp_ratio=hidden / dim, qkv_bias=True).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.zero_()
    return block


def pack(block: Block, parts: int) -> transformer.PackedBlock:
    attention, mlp = block.attn, block.mlp
    linears = {"qkv": attention.qkv, "proj": attention.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
    return transformer.PackedBlock(
        norm1=(block.norm1.weight, block.norm1.bias),
        norm2=(block.norm2.weight, block.norm2.bias),
        **{name: transformer.pack_linear(linear.weight, linear.bias, parts) for name, linear in linears.items()},
        eps=block.norm1.eps,
        n_heads=attention.num_heads,
        parts=parts,
    )


def random_tokens(n_images: int, n_tokens: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n_images, n_tokens, dim, generator=torch.Generator().manual_seed(seed))


def exact(block: Block, tokens: Tensor) -> Tensor:
    return copy.deepcopy(block).double()(tokens.double())


def errors(block: Block, parts: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of class tokens and of all others, in units of the output's deviation."""
    expected = exact(block, tokens)
    found = transformer.run_block(pack(block, parts), tokens.clone())
    assert found.isfinite().all()
    relative = (found - expected) / expected.std()
    return relative[:, 0], relative[:, 1:]


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@NEEDS_KERNELS
@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_is_that_of_timm(shape, n_tokens):
    block, tokens = random_block(*shape), random_tokens(2, n_tokens, shape[0], seed=n_tokens)
    class_token_1, others_1 = errors(block, 1, tokens)
    class_token_2, others_2 = errors(block, 2, tokens)
    class_token_3, others_3 = errors(block, 3, tokens)
    assert class_token_2.abs().max() < 2e-4
    assert class_token_3.abs().max() < 3e-6
    # Of the class token only the keys are rounded to one part; alone it attends to itself, whatever its key is.
    assert class_token_1.abs().max() < (2e-2 if n_tokens > 1 else 2e-4)
    if n_tokens > 1:
        assert others_2.abs().max() < 2e-4
        assert others_3.abs().max() < 3e-6
        assert others_1.abs().max() < 4e-2
        assert rms(others_2) < rms(others_1) / 50
        assert rms(others_3) < rms(others_2) / 10
        assert rms(class_token_1) < rms(others_1)


@NEEDS_KERNELS
def test_class_token_has_two_parts_in_a_block_of_one_part():
    """Its only errors are in how much it attends to whom: with no queries, it attends to all alike and has none."""
    block, tokens = random_block(128, 2, 512), random_tokens(2, 50, 128)
    block.attn.qkv.weight[:128] = 0
    block.attn.qkv.bias[:128] = 0
    class_token, others = errors(block, 1, tokens)
    assert class_token.abs().max() < 3e-5
    assert others.abs().max() > 1e-3, "the others were not rounded to one part"


@NEEDS_KERNELS
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [1, 16, 50, 197])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_last_block_gives_the_bits_of_the_class_token_and_leaves_the_others(shape, n_tokens, parts):
    block, tokens = pack(random_block(*shape), parts), random_tokens(3, n_tokens, shape[0])
    whole, last = transformer.run_block(block, tokens.clone()), tokens.clone()
    class_tokens = transformer.run_last_block(block, last)
    assert class_tokens.shape == (3, 1, shape[0])
    assert class_tokens.data_ptr() == last.data_ptr()
    assert torch.equal(class_tokens, whole[:, :1])
    assert not torch.equal(class_tokens, tokens[:, :1])
    assert torch.equal(last[:, 1:], tokens[:, 1:])


@NEEDS_KERNELS
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("n_images", [3, 16, 34])  # class tokens are multiplied 16 or 32 images at a time
def test_image_has_the_same_bits_alone_and_anywhere_in_a_batch(n_images, parts):
    block, tokens = pack(random_block(64, 2, 416), parts), random_tokens(n_images, 33, 64)
    for run in (transformer.run_block, transformer.run_last_block):
        together = run(block, tokens.clone())
        backwards = run(block, tokens.flip(0)).flip(0)
        alone = torch.cat([run(block, image.clone()) for image in tokens.split(1)])
        assert torch.equal(together, alone)
        assert torch.equal(together, backwards)
        assert len(torch.unique(together[:, 0], dim=0)) == n_images, "the images could not be told apart"


@NEEDS_KERNELS
def test_threads_that_run_at_the_same_time_do_not_disturb_each_other():
    """Tiles belong to a thread, and ctypes lets both run: long enough that the system takes turns on one core, too."""
    blocks = [pack(random_block(128, 2, 512), parts) for parts in (1, 2)]
    tokens = random_tokens(2, 197, 128)
    alone = [transformer.run_block(block, image[None].clone()) for block, image in zip(blocks, tokens, strict=True)]
    start = threading.Barrier(2)

    def run(number: int) -> bool:
        start.wait()
        found = (transformer.run_block(blocks[number], tokens[number : number + 1].clone()) for _ in range(100))
        return all([torch.equal(out, alone[number]) for out in found])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [True, True]


@NEEDS_KERNELS
def test_tiles_are_shared_with_torch():
    """torch's products in bfloat16 use them as well, in other sizes, and leave them as they like."""
    block, tokens = pack(random_block(64, 2, 256), 1), random_tokens(2, 33, 64)
    a, b = (torch.randn(40, 72, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    product, found = a @ b.T, transformer.run_block(block, tokens.clone())
    for _ in range(3):
        assert torch.equal(a @ b.T, product)
        assert torch.equal(transformer.run_block(block, tokens.clone()), found)
    torch.testing.assert_close(product.double(), a.double() @ b.double().T, rtol=2**-8, atol=1e-5)


@NEEDS_KERNELS
@pytest.mark.parametrize("garbage", [0x00, 0xFF])  # 0xFF: every number is NaN
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [1, 17, 32, 33])
def test_memory_around_is_left_alone_and_what_was_in_the_scratch_does_not_matter(n_tokens, parts, garbage):
    block, tokens = pack(random_block(192, 2, 416), parts), random_tokens(17, n_tokens, 192)
    expected = transformer.run_block(block, tokens.clone())
    arguments = ctypes.byref(block.arguments())
    used = load_library().block_scratch(arguments, len(tokens), n_tokens)
    scratch = torch.full((used + 4096,), garbage, dtype=torch.uint8)
    scratch[used:] = 0xAB
    memory = torch.full((tokens.numel() + 2048,), 7.0)
    memory[1024:-1024] = tokens.flatten()
    load_library().run_block(arguments, pointer(memory[1024:]), len(tokens), n_tokens, 0, pointer(scratch))
    assert torch.equal(memory[1024:-1024], expected.flatten())
    assert (memory[:1024] == 7).all()
    assert (memory[-1024:] == 7).all()
    assert (scratch[used:] == 0xAB).all()


@NEEDS_KERNELS
def test_output_takes_the_place_of_the_input():
    block, tokens = pack(random_block(64, 2, 256), 1), random_tokens(2, 5, 64)
    before = tokens.clone()
    assert transformer.run_block(block, tokens) is tokens
    assert not torch.equal(tokens, before)


@pytest.mark.parametrize("run", [transformer.run_block, transformer.run_last_block])
def test_tokens_that_cannot_be_changed_in_place_are_refused(run):
    block = pack(random_block(64, 2, 256), 1)
    wide = torch.zeros(2, 5, 128)
    with pytest.raises(AssertionError, match="tokens are changed in place, so they must lie one after the other"):
        run(block, wide[:, :, :64])
    with pytest.raises(AssertionError, match="tokens are changed in place"):
        run(block, wide[:1, :1, :64].expand(2, 5, 64))
    with pytest.raises(AssertionError, match="tokens have 128 numbers, the block takes 64"):
        run(block, wide)
    assert (wide == 0).all()


def test_no_images_are_no_work():
    block = pack(random_block(64, 2, 256), 2)
    assert transformer.run_block(block, torch.empty(0, 5, 64)).shape == (0, 5, 64)
    assert transformer.run_last_block(block, torch.empty(0, 5, 64)).shape == (0, 1, 64)


@NEEDS_KERNELS
@pytest.mark.parametrize(("parts", "tolerance"), [(2, 2e-4), (3, 3e-6)])
@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_norms_of_faint_tokens_depend_on_epsilon(eps, parts, tolerance):
    """Their variance is 1e-6, so that a wrong epsilon would change all."""
    block, tokens = random_block(64, 2, 256, eps=eps), 1e-3 * random_tokens(2, 20, 64)
    class_token, others = errors(block, parts, tokens)
    assert class_token.abs().max() < tolerance
    assert others.abs().max() < tolerance


@NEEDS_KERNELS
@pytest.mark.parametrize("number", [0.0, 1.0, -3.0, 0.1, 100.0])
def test_tokens_of_equal_numbers_have_no_variance(number):
    """Each norm is its shift then, however large the number is that has to cancel."""
    block, tokens = random_block(64, 2, 256), torch.full((2, 50, 64), number)
    update = (exact(block, tokens) - tokens).std()
    for parts, tolerance in ((1, 5e-2), (2, 1e-4), (3, 5e-5)):
        error = (transformer.run_block(pack(block, parts), tokens.clone()) - exact(block, tokens)).abs() / update
        assert error[:, 0].max() < min(1e-4, tolerance)
        assert error.max() < tolerance


@NEEDS_KERNELS
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_mean_of_tokens_cancels(offset):
    """In less than three parts the class token takes the mean off after averaging over all tokens, so more is lost."""
    block, tokens = random_block(64, 2, 256), random_tokens(2, 50, 64) + offset
    expected = exact(block, tokens)
    update = (expected - tokens).std()
    error, error_3, of_float32 = (
        (found - expected).abs().max() / update
        for found in (*(transformer.run_block(pack(block, parts), tokens.clone()) for parts in (2, 3)), block(tokens))
    )
    assert error < (3e-4 if offset < 100 else 2e-3)
    assert error_3 < 1.5 * of_float32


@NEEDS_KERNELS
@pytest.mark.parametrize(("gain", "largest", "tolerance"), [(20, 80, 1e-3), (100, 400, 3e-3)])
def test_softmax_of_large_scores(gain, largest, tolerance):
    """exp(100) is no float32, and the weights of most tokens are below the smallest one."""
    block, tokens = random_block(64, 2, 256), random_tokens(2, 50, 64)
    block.attn.qkv.weight[:128] *= math.sqrt(gain)
    heads = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(32)
    assert scores.max() > largest
    assert scores.min() < -largest
    class_token, others = errors(block, 2, tokens)
    assert class_token.abs().max() < 2e-4
    assert others.abs().max() < tolerance
    in_float32 = ((block(tokens) - exact(block, tokens)) / exact(block, tokens).std()).abs().max()
    for found in errors(block, 3, tokens):
        assert found.abs().max() < 2 * in_float32
    # In one part scores of 100 are off by some 0.3, so that weights are some other ones, but weights all the same.
    values = heads[2].transpose(1, 2).flatten(2)
    block.mlp.fc2.weight.zero_()
    block.mlp.fc2.bias.zero_()
    block.attn.proj.weight.copy_(torch.eye(64))
    block.attn.proj.bias.zero_()
    means = transformer.run_block(pack(block, 1), tokens.clone()) - tokens
    assert (means <= values.amax(1, keepdim=True) + 0.05).all()
    assert (means >= values.amin(1, keepdim=True) - 0.05).all()


@NEEDS_KERNELS
@pytest.mark.parametrize("n_tokens", [1, 17, 33, 50, 64])
def test_softmax_of_scores_far_below_zero(n_tokens):
    """Those of the tokens that only fill up the last block are 0, far above all others, and must not count."""
    block, tokens = random_block(64, 2, 256), random_tokens(2, n_tokens, 64)
    block.attn.qkv.bias[:64] = 6
    block.attn.qkv.bias[64:128] = -6
    heads = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    assert (heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(32)).max() < -87, "exp would not be 0 in float32"
    for parts, tolerance in ((2, 3e-4), (3, 1e-5)):
        class_token, others = errors(block, parts, tokens)
        assert class_token.abs().max() < tolerance
        assert n_tokens == 1 or others.abs().max() < 2 * tolerance
    assert transformer.run_block(pack(block, 1), tokens.clone()).isfinite().all()


@NEEDS_KERNELS
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gelu_from_the_smallest_to_the_largest_numbers(parts):
    """A block that is nothing but GELU of the biases of its hidden layer."""
    positive = torch.cat([torch.linspace(0, 8, 242), torch.tensor([5.9999, 6.0, 6.0001, 10.0, 99.0, 1e-8, 1e-30])])
    positive = torch.cat([positive, torch.logspace(1, 37, 7)])
    numbers = torch.cat([positive, -positive])
    block = zero_block(512, 8, 512)
    block.mlp.fc1.bias.copy_(numbers)
    block.mlp.fc2.weight.copy_(torch.eye(512))
    expected = functional.gelu(numbers.double())
    found = transformer.run_block(pack(block, parts), torch.zeros(2, 3, 512))
    of_polynomial = 1e-6 if parts < 3 else 5e-8
    for token in range(3):
        bits = 24 if parts == 3 else 16 if parts == 2 or token == 0 else 8
        error = (found[:, token] - expected).abs()
        assert (error <= of_polynomial + 2**-bits * expected.abs()).all()


@NEEDS_KERNELS
@pytest.mark.parametrize(("parts", "tolerance"), [(1, 3e-5), (2, 3e-5), (3, 1e-5)])
@pytest.mark.parametrize(
    ("size", "dim", "height", "width"),
    [
        (16, 64, 64, 48),
        (16, 384, 16, 16),  # one patch
        (16, 64, 71, 50),  # margins of 7 and 2
        (14, 96, 56, 70),  # 588 inputs, padded to 608
        (14, 64, 41, 29),
        (8, 32, 24, 40),
        (32, 64, 64, 96),
        (32, 32, 63, 95),
    ],
)
def test_patches_are_the_convolution_of_normalised_pixels(size, dim, height, width, parts, tolerance):
    generator = torch.Generator().manual_seed(size)
    kernel = torch.randn(dim, 3, size, size, generator=generator) / math.sqrt(3 * size * size)
    bias = torch.randn(dim, generator=generator)
    pixels = torch.randint(256, (3, 3, height, width), dtype=torch.uint8, generator=generator)
    images = (pixels.double() / 255 - MEAN.double()) / STD.double()
    expected = functional.conv2d(images, kernel.double(), bias.double(), stride=size).flatten(2).transpose(1, 2)
    packed = transformer.pack_patches(kernel, bias, MEAN, STD, parts)
    found = transformer.embed_patches(packed, pixels)
    assert found.shape == expected.shape
    assert ((found - expected).abs().max() / expected.std()) < tolerance
    alone = torch.cat([transformer.embed_patches(packed, image) for image in pixels.split(1)])
    assert torch.equal(found, alone)


@NEEDS_KERNELS
def test_patches_of_pixels_that_do_not_lie_one_after_the_other():
    packed = transformer.pack_patches(torch.randn(32, 3, 8, 8), None, MEAN, STD, parts=1)
    pixels = torch.randint(256, (2, 32, 24, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert not pixels.is_contiguous()
    assert torch.equal(
        transformer.embed_patches(packed, pixels),
        transformer.embed_patches(packed, pixels.clone(memory_format=torch.contiguous_format)),
    )
    cropped = pixels.contiguous()[:, :, 3:19, 5:13]
    assert torch.equal(
        transformer.embed_patches(packed, cropped), transformer.embed_patches(packed, cropped.contiguous())
    )


@NEEDS_KERNELS
def test_patch_at_the_mean_is_the_bias_whatever_the_rounding_of_the_weights():
    kernel, bias = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 64)
    grey = torch.full((1, 3, 1, 1), 128 / 255)
    packed = transformer.pack_patches(kernel, bias, mean=grey, std=grey, parts=1)
    found = transformer.embed_patches(packed, torch.full((1, 3, 16, 16), 128, dtype=torch.uint8))
    torch.testing.assert_close(found[0, 0], bias, rtol=0, atol=2e-5)  # the roundings add up to 1e-4


@NEEDS_KERNELS
def test_patches_stay_within_their_memory():
    packed = transformer.pack_patches(torch.randn(32, 3, 14, 14), None, MEAN, STD, parts=1)
    pixels = torch.randint(256, (2, 3, 30, 45), dtype=torch.uint8)
    expected = transformer.embed_patches(packed, pixels)
    used = load_library().patches_scratch(30, 45, 14, 32)
    scratch = torch.full((used + 4096,), 0xFF, dtype=torch.uint8)
    out = torch.full((expected.numel() + 2048,), 7.0)
    linear = ctypes.byref(packed.linear.arguments())
    arguments = (pointer(pixels), 2, 30, 45, 14, 32, linear, packed.parts, pointer(out[1024:]), pointer(scratch))
    load_library().embed_patches(*arguments)
    assert torch.equal(out[1024:-1024], expected.flatten())
    assert (out[:1024] == 7).all()
    assert (out[-1024:] == 7).all()
    assert (scratch[used:] == 0xFF).all()


def test_images_without_a_whole_patch_have_none():
    packed = transformer.pack_patches(torch.randn(32, 3, 16, 16), None, MEAN, STD, parts=1)
    for images, height, width, n_patches in ((0, 32, 32, 4), (2, 15, 64, 0), (2, 64, 15, 0)):
        pixels = torch.zeros(images, 3, height, width, dtype=torch.uint8)
        assert transformer.embed_patches(packed, pixels).shape == (images, n_patches, 32)


# Third parts of 1e-30 would be below the smallest normal number.
@pytest.mark.parametrize(("parts", "bits", "smallest"), [(1, 8, 1e-30), (2, 16, 1e-30), (3, 24, 1e-25)])
@pytest.mark.parametrize("scale", [None, 1e-3, 1.0, 1e30])
def test_split_keeps_8_significant_bits_a_part(scale, parts, bits, smallest):
    scale = smallest if scale is None else scale
    numbers = scale * torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    found = transformer.split(numbers, parts)
    assert found.shape == (parts, 100, 100)
    assert found.dtype == torch.bfloat16
    error = (found.double().sum(dim=0) - numbers).abs() / numbers.abs()
    assert error.max() < 2**-bits
    assert parts < 3 or error.max() == 0, "24 bits are all that a float32 has"
    assert torch.equal(found[0], numbers.bfloat16())


@pytest.mark.parametrize(("n_outputs", "n_inputs"), [(32, 32), (96, 64), (64, 160)])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_packed_weights_lie_in_the_order_of_the_tiles(n_outputs, n_inputs, parts):
    """As products.h has it: panels of 32 outputs; in them, for each 32 inputs, two tiles of 16 pairs of inputs x 16
    outputs x 2."""
    weight = torch.randn(n_outputs, n_inputs, generator=torch.Generator().manual_seed(0))
    packed = transformer.pack_linear(weight, None, parts)
    output, input_ = torch.arange(n_outputs)[:, None], torch.arange(n_inputs)[None]
    tile = (output // 32 * (n_inputs // 32) + input_ // 32) * 2 + output % 32 // 16
    place = tile * 512 + input_ % 32 // 2 * 32 + output % 16 * 2 + input_ % 2
    n_parts = max(2, parts)
    assert packed.weights.numel() == n_parts * weight.numel()
    found = [part[place] for part in packed.weights.double().view(n_parts, -1)]
    assert ((sum(found) - weight).abs() <= 2 ** (-8 * n_parts) * weight.abs()).all()
    for number, part in enumerate(found[1:], start=1):
        assert (part.abs() <= 2 ** (-8 * number) * weight.abs()).all()
    assert torch.equal(packed.bias, torch.zeros(n_outputs))
