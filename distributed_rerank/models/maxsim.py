"""MaxSim: the cached tokens of a TokenSiamese compared without its trained head.

Late interaction as in ColBERT (Khattab and Zaharia 2020), in both directions: a token's similarity to an image is that
to the image's most similar token. The gain of a trained head over it shows what training is worth.
"""

from dataclasses import replace

from jaxtyping import Float, Float32, Num
from torch import Tensor

from distributed_rerank.models.token_siamese import TokenSiamese


class MaxSim(TokenSiamese):
    """A TokenSiamese whose logit is minus the mean similarity of best matching tokens; its head is not used."""

    def forward(
        self,
        encoded_query: Num[Tensor, "pair number"],
        encoded_gallery: Num[Tensor, "pair number"],
        first_stage_distance: Float[Tensor, " pair"],
    ) -> Float32[Tensor, " pair"]:
        """Minus the similarity of best matches; the distance is not used."""
        return -self.best_match(encoded_query, encoded_gallery)


def maxsim_of(model: TokenSiamese) -> MaxSim:
    """A MaxSim with the encoder of `model`."""
    extractor = replace(model.config.extractor, weights="none")
    made = MaxSim(replace(model.config, extractor=extractor))
    made.load_state_dict(model.state_dict())
    return made
