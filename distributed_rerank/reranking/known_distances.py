"""First-stage distances as the model and its chain know them, or one line that says why they are others."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed_rerank.chain.chain import Chain, NeighbourhoodStep, QueryExpansionStep
from distributed_rerank.config.evaluation import FirstStageConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.distance_kinds import Conversion, to_l2
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.tables import is_rewritten
from distributed_rerank.data.trained_on import TrainedOn, are_normalised, different_setting, spread_of
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.storage import manifests
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.distances import exact_pair_distances

logger = logging.getLogger(__name__)

_QUERIES_PER_BLOCK = 256
_PAIRS_COMPARED = 4096
"""Of the lists with distances of the embeddings: enough to tell one kind from another."""
_MOST_DIFFERENCE = 0.1
"""Median relative difference of a list's distances from those of the embeddings; approximate indexes stay below it."""
_OTHER_SCALE = 2.0
"""Distances of other images of the same kind differ from those of the training by less than this factor."""
_IMPOSSIBLE_SCALE = 16.0
"""Distances of the kind that was told never differ by this factor."""
_CLEARLY = 1.25
"""A kind that was not guessed must fit better by this factor to be named."""


@dataclass(frozen=True)
class KnownDistances:
    """What a model and its chain expect of first-stage distances."""

    record: TrainedOn | None = None
    """The embeddings and distances of the training; None: the folder does not say."""
    are_used: bool = False
    """Whether the outcome depends on the numbers, and not on their order alone."""

    @property
    def is_unit(self) -> bool | None:
        """Whether the embeddings have length 1; None: not known."""
        return None if self.record is None else self.record.normalised


def known_distances(model: PairwiseModel | None, chain: Chain) -> KnownDistances:
    """What this model and chain expect."""
    if model is None:
        return KnownDistances()
    step = chain.pairwise
    by_model = step is not None and (model.uses_distance or (step.rule == "fuse" and step.weight > 0))
    by_chain = any(isinstance(other, NeighbourhoodStep | QueryExpansionStep) for other in chain.neighbourhood)
    return KnownDistances(model.trained_on, by_model or by_chain or bool(chain.calibration))


def check_embeddings(known: KnownDistances, embeddings: Embeddings, settings: dict[str, Any] | None, name: str) -> None:
    """Raises BadInput for embeddings of another extractor, length or dimension than those of the training.

    `settings` are those of their extractor, None where nobody knows; `name` is the option that they came from.
    """
    record = known.record
    if record is None or not known.are_used or not len(embeddings):
        return
    fix = f"give {name} of the extractor that the model was trained with, or train a model for this one"
    found = None if settings is None else different_setting(record.extractor, settings)
    if found is not None:
        setting, was, now = found
        raise BadInput(
            f"--model was trained on embeddings of another extractor: {setting} was {was!r}, here it is {now!r}; {fix}"
        )
    if record.from_table and settings is not None:
        logger.warning(
            "--model was trained on a table of embeddings that another program wrote, and these are of an extractor: "
            "the chain fits only if they are of the same kind; give --embeddings as in the training if they are not"
        )
    dim = embeddings.dim
    if dim != record.dim:
        raise BadInput(f"--model was trained on embeddings of {record.dim} numbers, these have {dim}; {fix}")
    if are_normalised(embeddings.blocks()) != record.normalised:
        were, are = ("of length 1", "not") if record.normalised else ("not of length 1", "are")
        raise BadInput(f"--model was trained on embeddings {were}, these {are}; scale them as there, or train a model")


def extractor_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the extractor that made the embeddings in a folder of `embed`; None where nobody knows.

    That is so for another program's embeddings, and for those that one has rewritten.
    """
    if not (folder / manifests.MANIFEST).is_file() or is_rewritten(folder):
        return None
    config = manifests.read_manifest(folder)["fingerprint"].get("config")
    return config.get("extractor") if isinstance(config, dict) else None


def settle_distances(
    lists: CandidateLists,
    conversion: Conversion,
    known: KnownDistances,
    catalogue: Catalogue,
    embeddings: Embeddings | None,
    config: FirstStageConfig,
) -> tuple[CandidateLists, bool]:
    """Lists of another system with the L2 distances of the model's embeddings, and whether they were computed anew.

    `conversion` has read them. Distances that could not be converted, or were guessed wrong, are computed from the
    `embeddings`, which orders the lists anew. Raises BadInput where the numbers matter and are not what they should be.
    """
    path = config.candidates
    if not bool((lists.items >= 0).any()):
        return lists, False
    logger.info("%s: %s%s", path, conversion.describe(), ", which is a guess" if conversion.is_guess else "")
    if embeddings is not None:
        computed = distances_of(lists, catalogue, embeddings)
        difference = _difference(lists, computed)
        if not conversion.is_l2 or (conversion.is_guess and difference > _MOST_DIFFERENCE):
            return _in_new_order(lists, computed, path), True
        if known.are_used and difference > _MOST_DIFFERENCE:
            raise BadInput(
                f"{path}: as {conversion.kind} the values differ by {difference:.0%} from the distances of the "
                "embeddings; give another --distances, or the embeddings that the lists were made from"
            )
        return lists, False
    if known.are_used:
        _refuse_unknown(lists, conversion, known, path)
    return lists, False


def _refuse_unknown(lists: CandidateLists, conversion: Conversion, known: KnownDistances, path: Path | None) -> None:
    advice = "say with --distances what the values are, or give --embeddings, and they are computed"
    if not conversion.is_l2:
        problem = conversion.problem() or conversion.describe()
        raise BadInput(f"{path}: {problem}, but the model needs L2 distances; {advice}")
    if known.record is None:
        logger.warning("%s: the model folder does not say which distances it was trained on: train it again", path)
        return
    trained = {int(rank): quantiles for rank, quantiles in known.record.spread.items()}
    own = {int(rank): quantiles for rank, quantiles in spread_of(lists).items() if int(rank) in trained}
    if not own:
        return
    medians = {rank: (own[rank][2], trained[rank][2]) for rank in own}
    misfit = _misfit(medians)
    told = f"{medians[1][0]:.3g} to the nearest candidate, {medians[1][1]:.3g} in the training (medians)"
    better = _better_kind(medians, misfit) if conversion.is_guess else None
    if better is not None:
        raise BadInput(
            f"{path}: {conversion.describe()}, but these are not the distances of the training: {told}; they look like "
            f"{better}: {advice}"
        )
    if misfit > (_OTHER_SCALE if conversion.is_guess else _IMPOSSIBLE_SCALE):
        raise BadInput(f"{path}: {conversion.describe()}, but the training had others: {told}; {advice}")
    if misfit > _OTHER_SCALE:
        logger.warning("%s: other distances than in the training: %s", path, told)


def _misfit(medians: dict[int, tuple[float, float]]) -> float:
    """The factor, at least 1, by which the lists' medians are off, at the nearest rank or in their growth with rank."""
    first, last = min(medians), max(medians)
    logs = {rank: np.log(max(own, 1e-6) / max(trained, 1e-6)) for rank, (own, trained) in medians.items()}
    factors = [abs(logs[rank]) for rank in (first, last)]
    if last > first:
        growth = [np.log(max(medians[last][side], 1e-6) / max(medians[first][side], 1e-6)) for side in (0, 1)]
        factors.append(abs(np.log(max(growth[0], 1e-3) / max(growth[1], 1e-3))))
    return float(np.exp(max(factors)))


def _better_kind(medians: dict[int, tuple[float, float]], misfit: float) -> str | None:
    """A kind of distances for which the values fit the training clearly better than as L2 distances; None for none."""
    fits = {
        kind: _misfit({rank: (float(to_l2(np.array([own]), kind)[0]), other) for rank, (own, other) in medians.items()})
        for kind in ("squared_l2", "one_minus_cosine")
    }
    best = min(fits, key=lambda kind: fits[kind])
    return best if misfit > _CLEARLY and fits[best] * _CLEARLY < misfit else None


def distances_of(lists: CandidateLists, catalogue: Catalogue, embeddings: Embeddings) -> torch.Tensor:
    """L2 distances [query, k] of the embeddings of all pairs in the lists; inf where there is no candidate."""
    rows, distances = embeddings.rows_of(catalogue.ids), torch.full(lists.items.shape, torch.inf)
    for start, stop in sharding.blocks(len(lists), _QUERIES_PER_BLOCK):
        part = lists[start:stop]
        row, column = (part.items >= 0).nonzero(as_tuple=True)
        # The images of these pairs, and which of them are the query and the candidate of each.
        images, places = torch.stack([part.query_items[row], part.items[row, column]]).unique(return_inverse=True)
        vectors = torch.from_numpy(embeddings.matrix[rows[images.numpy()]])
        distances[start + row, column] = exact_pair_distances(vectors, vectors, places[0], places[1])
    return distances


def _difference(lists: CandidateLists, computed: torch.Tensor) -> float:
    """Median relative difference of the lists' distances from the computed ones, over evenly chosen pairs."""
    is_there = lists.items >= 0
    own, other = lists.distances[is_there].double(), computed[is_there].double()
    chosen = torch.linspace(0, len(own) - 1, min(len(own), _PAIRS_COMPARED)).long()
    own, other = own[chosen], other[chosen]
    return float(((own - other).abs() / other.clamp(min=1e-3)).median())


def _in_new_order(lists: CandidateLists, computed: torch.Tensor, path: Path | None) -> CandidateLists:
    """The lists with these distances, each by (distance, item)."""
    ordered = lists.with_distances(computed)
    n_other = int((ordered.items != lists.items).any(dim=1).sum())
    logger.warning(
        "%s: the distances are computed from the embeddings; %d of %d lists get another order",
        path,
        n_other,
        len(lists),
    )
    return ordered
