"""Parts that ConcatSiamese and SplitSiamese share: OML's head, its checkpoints, the mean of both orders."""

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn import functional

from distributed_rerank.errors import BadInput
from distributed_rerank.models import weights


def logit_of_mean_probability(a: Float32[Tensor, " pair"], b: Float32[Tensor, " pair"]) -> Float32[Tensor, " pair"]:
    """logit((sigmoid(a) + sigmoid(b)) / 2), computed so that pairs with probabilities near 0 or 1 stay in order."""
    return torch.logaddexp(functional.logsigmoid(a), functional.logsigmoid(b)) - torch.logaddexp(
        functional.logsigmoid(-a), functional.logsigmoid(-b)
    )


def mlp_head(dim: int, hidden_dims: Sequence[int], dropout: float, seed: int) -> nn.Sequential:
    """OML's head: Linear, Sigmoid, Dropout for each hidden dimension, then a Linear to one number without bias."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for hidden in hidden_dims:
            layers += [nn.Linear(dim, hidden), nn.Sigmoid(), nn.Dropout(dropout)]
            dim = hidden
        return nn.Sequential(*layers, nn.Linear(dim, 1, bias=False))


def load_siamese_weights(model: nn.Module, path: str) -> None:
    """Load a ConcatSiamese state dict: OML's, Lightning's with a prefix, or ours.

    Raises BadInput if the file cannot be read, holds no `extractor.` entries, or has other names or shapes.
    """
    state = weights.read_state_dict(path)
    first = next((name for name in state if "extractor." in name), None)
    if first is None:
        raise BadInput(f"weights {path} hold no 'extractor.' entries; give a state dict of OML's or our ConcatSiamese")
    prefix = first[: first.index("extractor.")]
    weights.load_exactly(model, {name.removeprefix(prefix): value for name, value in state.items()}, path)
