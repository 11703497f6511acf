"""Parts that ConcatSiamese and SplitSiamese share: OML's head, its checkpoints, the mean of both orders."""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn import functional

from distributed_rerank.config.pairwise import ConcatSiameseConfig
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


def hidden_dims_for(config: ConcatSiameseConfig) -> tuple[int, ...]:
    """The hidden sizes of the head: those of the weights' file where there is one, else those of `config`.

    Raises BadInput where `config` asks for others than the file has.
    """
    if config.pairwise_weights is None:
        return config.hidden_dims
    state = read_siamese_weights(config.pairwise_weights)
    # The layers of the head by number; the last of them has the logit.
    layers = sorted((int(name.split(".")[1]), name) for name in state if re.fullmatch(r"head\.\d+\.weight", name))
    found = tuple(len(state[name]) for _, name in layers[:-1])
    if layers and found != config.hidden_dims != type(config)().hidden_dims:
        raise BadInput(
            f"weights {config.pairwise_weights} have a head of hidden sizes {list(found)}, not "
            f"{list(config.hidden_dims)}; leave --hidden-dims out"
        )
    return found if layers else config.hidden_dims


def load_siamese_weights(model: nn.Module, path: str) -> None:
    """Load a ConcatSiamese state dict: OML's, Lightning's with a prefix, or ours.

    Raises BadInput if the file cannot be read, holds no `extractor.` entries, or has other names or shapes.
    """
    weights.load_exactly(model, read_siamese_weights(path), path)


def read_siamese_weights(path: str) -> dict[str, Tensor]:
    """The state dict of a file without its prefix. Raises BadInput as `load_siamese_weights` does."""
    state = weights.read_state_dict(path)
    first = next((name for name in state if "extractor." in name), None)
    if first is None:
        raise BadInput(f"weights {path} hold no 'extractor.' entries; give a state dict of OML's or our ConcatSiamese")
    prefix = first[: first.index("extractor.")]
    return {name.removeprefix(prefix): value for name, value in state.items()}
