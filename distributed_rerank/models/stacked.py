"""Parts that ConcatSiamese and SplitSiamese share: OML's head, its checkpoints, the mean of both orders."""

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn import functional

from distributed_rerank.errors import BadInput
from distributed_rerank.models import weights

_HIDDEN = re.compile(r"head\.\d+\.weight")


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


def read_siamese_weights(path: str) -> dict[str, Tensor]:
    """A ConcatSiamese state dict: OML's, Lightning's with a prefix, or ours, without the prefix.

    Raises BadInput if the file cannot be read or holds no `extractor.` entries.
    """
    state = weights.read_state_dict(path)
    first = next((name for name in state if "extractor." in name), None)
    if first is None:
        raise BadInput(f"weights {path} hold no 'extractor.' entries; give a state dict of OML's or our ConcatSiamese")
    prefix = first[: first.index("extractor.")]
    return {name.removeprefix(prefix): value for name, value in state.items()}


def hidden_dims_of(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The widths of the hidden layers of `mlp_head` in a ConcatSiamese state dict, in order."""
    layers = {int(name.split(".")[1]): len(value) for name, value in state.items() if _HIDDEN.fullmatch(name)}
    return tuple(layers[number] for number in sorted(layers))[:-1]
