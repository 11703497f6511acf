"""A slow pairwise model as the teacher of a fast one: it scores the mined lists once, the student learns from that.
Layer 3.

What is taught is the order that the teacher's own chain would give: where that fuses the logit with the first-stage
distance, so does the teacher here. The logits are kept by the scoring stage, so a stopped run does not pay twice.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from distributed_rerank.chain.chain import PairwiseStep, read_chain
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model, local_folder
from distributed_rerank.models.weights import digest_of_state
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.scoring.score import Score
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.training.plan import Step, is_list_loss


@dataclass(frozen=True)
class Teacher:
    """A trained pairwise model and the constants that its chain fuses the logit with; None = the logit alone."""

    model: PairwiseModel
    fusion: PairwiseStep | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What decides its logits."""
        fusion = None if self.fusion is None else (self.fusion.weight, self.fusion.temperature)
        return {"weights": digest_of_state(self.model.state_dict()), "fusion": fusion}

    def fuse(self, logits: Float32[np.ndarray, "*n"], distances: Float32[np.ndarray, "*n"]) -> np.ndarray:
        """Logits on the scale of the model's own, the first stage's distance added as the chain adds it."""
        if self.fusion is None:
            return logits
        return logits + self.fusion.weight * self.fusion.temperature * distances


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's logits by pair of items."""

    keys: Int64[Tensor, " pair"]
    """query item x number of items + gallery item, ascending."""
    logits: Float32[Tensor, " pair"]
    n_items: int

    def of(self, step: Step) -> Step:
        """The step with the teacher's logits of its pairs, NaN where there is none."""
        wanted = step.query_items * self.n_items + step.gallery_items
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        logits: Float[Tensor, " pair"] = torch.where(self.keys[place] == wanted, self.logits[place], torch.nan)
        return replace(step, teacher_logits=logits)


def read_teacher(folder: str | Path) -> Teacher:
    """The model in a folder of jobs/train.py, with the fusion of its chain. Raises BadInput as `load_model` does."""
    path = local_folder(folder)
    model = load_model(path)
    step = read_chain(path).pairwise if (path / "chain.json").is_file() else None
    return Teacher(model, step if step is not None and step.rule == "fuse" else None)


def check_teachable(config: TrainingConfig) -> None:
    """Raises BadInput where nothing of what a teacher says would be used."""
    if not is_list_loss(config.loss) or config.mining != "lists":
        raise BadInput(
            f"a teacher orders lists, which loss={config.loss} with mining={config.mining} has not; "
            "take --loss listwise --mining lists, or leave --teacher out"
        )


def score_by_teacher(
    teacher: Teacher,
    catalogue: Catalogue,
    lists: CandidateLists,
    folder: Path,
    work: WorkConfig,
    score: Score,
) -> TeacherLogits:
    """The teacher's logits of all pairs of the lists, kept in `folder`."""
    # The teacher's logits decide the weights, so blocks and batches are the defaults whatever the job's are.
    work = WorkConfig(max_rejects=work.max_rejects, encoding_gb=work.encoding_gb, decode_threads=work.decode_threads)
    top_n = lists.items.shape[1]
    found = score_candidates(catalogue, lists, teacher.model, top_n, folder, work=work, score=score)
    is_scored = np.isfinite(found.logits)
    query = np.broadcast_to(lists.query_items[:, None], lists.items.shape)[is_scored]
    logits = teacher.fuse(found.logits[is_scored], lists.distances[is_scored])
    keys, order = (tensor_of(query) * len(catalogue) + tensor_of(lists.items[is_scored])).sort()
    if len(keys) == 0:
        raise BadInput("the teacher has no pair to score; give images that have candidates")
    return TeacherLogits(keys, tensor_of(logits)[order], len(catalogue))
