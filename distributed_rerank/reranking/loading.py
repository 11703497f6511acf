"""The pairwise model that a job is told to use, and the chain that its logits go through."""

import logging
from dataclasses import replace
from pathlib import Path

from distributed_rerank.chain.chain import Chain, PairwiseStep, read_chain
from distributed_rerank.config.evaluation import RerankerConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model, local_folder

logger = logging.getLogger(__name__)


def load_model_and_chain(config: RerankerConfig) -> tuple[PairwiseModel | None, Chain]:
    """A pairwise model and how its logits become an order.

    The chain is the model folder's chain.json (without one OML's rule), OML's rule, no step, or a chain.json of its
    own. `top_n` overrides the chain's; the default of OML's rule is 10. Raises BadInput for a top_n that the chain has
    no use for, and as `load_model` and `read_chain` do.
    """
    folder, chain, top_n = config.model, config.chain, config.top_n
    if folder is None:
        if chain not in ("model", "first_stage"):
            raise BadInput(f"--chain {chain} needs a pairwise model; give --model")
        if top_n is not None:
            raise BadInput(f"--top-n {top_n} needs a pairwise model; give --model")
        return None, Chain()
    config.check_hub()
    path = local_folder(folder)
    model = load_model(path)
    has_own = chain == "model" and (path / "chain.json").is_file()
    if chain == "first_stage":
        found = Chain()
    elif chain == "replace" or (chain == "model" and not has_own):
        if chain == "model":
            logger.warning("%s has no chain.json: CANDIDATES ARE ORDERED BY THE LOGIT ALONE, as OML does", path)
        found = Chain((PairwiseStep(top_n=10 if top_n is None else top_n, rule="replace"),))
    else:
        found = read_chain(path if has_own else Path(chain))
    if top_n is None:
        return model, found
    if found.pairwise is None:
        raise BadInput(f"--top-n {top_n} changes nothing: the chain is {found.describe()}; add --chain replace")
    steps = tuple(replace(step, top_n=top_n) if isinstance(step, PairwiseStep) else step for step in found.steps)
    return model, replace(found, steps=steps)
