"""The interface of pairwise models: encode an image once, score a pair of encodings many times.

encode(pixels)                                                  one tensor per image, computed once and cached
forward(encoded_query, encoded_gallery, first_stage_distance)   one logit per pair; larger = more different

The evaluator and the trainer know nothing else about a model.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from distributed_rerank.data.trained_on import TrainedOn
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.errors import BadInput
from distributed_rerank.models import weights
from distributed_rerank.models.extractor import Extractor


class PairwiseModel(nn.Module):
    """Base of the pairwise models; a subclass sets `encoding_shape` and `encoding_dtype`, defines encode and forward.

    Batch normalisation always uses its stored statistics, in training too. Otherwise the result of a step would depend
    on how a batch is divided among workers, and a pair's logit on the other pairs of its batch.
    """

    encoding_shape: tuple[int, ...]
    """Shape of one image's encoding."""
    encoding_dtype: torch.dtype
    uses_distance = False
    """Whether `forward` looks at the first-stage distance."""
    trained_on: TrainedOn | None = None
    """The first stage that it was trained on; None: not known."""

    def __init__(self, config: Any, extractor: Extractor) -> None:
        super().__init__()
        self.config = config
        self.extractor = extractor
        self.is_backbone_frozen = False
        self._gflop_per_pair: float | None = None  # counted once and kept: on a prepared model it cannot be counted

    @property
    def transform(self) -> InferenceTransform:
        """Turns a decoded image into the pixels for `encode`."""
        return self.extractor.transform

    def encode(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Tensor:
        """One tensor of `encoding_shape` and `encoding_dtype` per image, differentiable if its dtype is."""
        raise NotImplementedError

    def encode_and_embed(self, pixels: UInt8[Tensor, "image 3 height width"]) -> tuple[Tensor, Tensor | None]:
        """The encodings, and the images' embeddings by the extractor where the backbone sees one image at a time."""
        return self.encode(pixels), None

    def forward(
        self, encoded_query: Tensor, encoded_gallery: Tensor, first_stage_distance: Float[Tensor, " pair"]
    ) -> Float32[Tensor, " pair"]:
        """One logit per pair, larger = more different; row i of the three arguments is pair i."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """All that decides the logits: kind, config and weights by content, without the paths they came from."""
        config: Any = dataclasses.asdict(self.config)
        if "pairwise_weights" in config:
            config["pairwise_weights"] = None
        config["extractor"]["weights"] = None
        return {"kind": type(self).__name__, "config": config, "weights": weights.digest_of_state(self.state_dict())}

    @property
    def bytes_per_image(self) -> int:
        """Size of one image's encoding in bytes."""
        return math.prod(self.encoding_shape) * self.encoding_dtype.itemsize

    def gflop_per_pair(self) -> float:
        """Cost of `forward` for one pair in 1e9 floating-point operations, of which a multiply-add is two."""
        if self._gflop_per_pair is not None:
            return self._gflop_per_pair
        state = {name: value.detach().to("meta") for name, value in (*self.named_parameters(), *self.named_buffers())}
        encoding = torch.empty(1, *self.encoding_shape, dtype=self.encoding_dtype, device="meta")
        was_training = self.training
        self.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(self, state, (encoding, encoding, torch.empty(1, device="meta")))
        self.train(was_training)
        self._gflop_per_pair = counter.get_total_flops() / 1e9
        return self._gflop_per_pair

    def train(self, mode: bool = True) -> "PairwiseModel":
        """As nn.Module's, except that batch normalisation and a frozen backbone stay in evaluation mode."""
        super().train(mode)
        if self.is_backbone_frozen:
            self.extractor.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def freeze_backbone(self) -> "PairwiseModel":
        """Turn off gradients, dropout and moving statistics in the backbone, for every later call of train() too."""
        self.is_backbone_frozen = True
        self.extractor.requires_grad_(False)
        return self.train(self.training)

    def unfreeze_backbone(self) -> "PairwiseModel":
        """Undo `freeze_backbone`."""
        self.is_backbone_frozen = False
        self.extractor.requires_grad_(True)
        return self.train(self.training)

    def checkpoint_gradients(self) -> "PairwiseModel":
        """Compute the backbone's activations again in the backward pass instead of storing them; needs less memory.

        Raises BadInput if timm has no such switch for this backbone.
        """
        try:
            self.extractor.model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            name = self.extractor.config.name
            raise BadInput(f"extractor {name} has no gradient checkpointing ({error}); turn it off") from error
        return self

    def parameter_groups(self, lr: float, backbone_lr: float) -> list[dict[str, Any]]:
        """Groups for a torch optimiser: backbone at `backbone_lr`, the rest at `lr`, without frozen parameters."""
        groups = [
            {"name": "backbone", "params": _trainable(self.extractor.named_parameters()), "lr": backbone_lr},
            {"name": "head", "params": _trainable(self._own_parameters()), "lr": lr},
        ]
        return [group for group in groups if group["params"]]

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if not name.startswith("extractor."))

    def prepare_for_inference(self, device: torch.device | str) -> "PairwiseModel":
        """Move to `device`, end training for good, cast the backbone to its format for inference. Returns itself.

        Head and logits stay float32.
        """
        self.gflop_per_pair()
        self.to(device).eval().requires_grad_(False)
        self.extractor.prepare_for_inference(device)
        return self


def _trainable(parameters: Iterator[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    return [p for _, p in parameters if p.requires_grad]
