"""A slow pairwise model as the teacher of a fast one: it scores the mined lists once, the student learns from that.

The teacher's order is that of its own chain: where the chain fuses the logit with the first-stage distance, so does the
teacher here. The scoring stage keeps the logits, so a stopped training scores no pair twice.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from distributed_rerank.chain.chain import PairwiseStep, read_chain
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model, local_folder
from distributed_rerank.models.weights import digest_of_state
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.scoring.score import ScoreExecutors
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.training.plan import TeacherLogits, is_list_loss


@dataclass(frozen=True)
class Teacher:
    """A trained pairwise model with the chain step that fuses its logit with the distance; None = the logit alone."""

    model: PairwiseModel
    fusion: PairwiseStep | None = None

    def fingerprint(self) -> dict[str, Any]:
        """The weights and constants that decide its logits."""
        fusion = None if self.fusion is None else (self.fusion.weight, self.fusion.temperature)
        return {"weights": digest_of_state(self.model.state_dict()), "fusion": fusion}

    def fuse(self, logits: Float32[np.ndarray, "*n"], distances: Float32[np.ndarray, "*n"]) -> np.ndarray:
        """The fused logits, on the scale of the model's own."""
        if self.fusion is None:
            return logits
        return logits + self.fusion.weight * self.fusion.temperature * distances


def read_teacher(folder: str | Path) -> Teacher:
    """The model in a folder of the training stage, with its chain's fusion. Raises BadInput as `load_model` does."""
    path = local_folder(folder)
    model = load_model(path)
    fusion = read_chain(path).pairwise if (path / "chain.json").is_file() else None
    return Teacher(model, fusion if fusion is not None and fusion.rule == "fuse" else None)


def check_teachable(config: TrainingConfig) -> None:
    """Raises BadInput for a loss or mining that cannot use a teacher."""
    if not is_list_loss(config.loss) or config.mining != "lists":
        raise BadInput(
            f"a teacher orders lists, and loss={config.loss} with mining={config.mining} has none; "
            "take --loss listwise --mining lists, or leave --teacher out"
        )


def score_by_teacher(
    teacher: Teacher,
    catalogue: Catalogue,
    lists: CandidateLists,
    folder: Path,
    work: WorkConfig,
    executors: ScoreExecutors | None,
) -> TeacherLogits:
    """The teacher's logits of all pairs of the lists, kept in `folder`. Raises BadInput where there is no pair."""
    # The teacher's logits decide the weights, so blocks and batches are the defaults whatever the job's are.
    work = WorkConfig(max_rejects=work.max_rejects, encoding_gb=work.encoding_gb, decode_threads=work.decode_threads)
    top_n = lists.items.shape[1]
    scored = score_candidates(catalogue, lists, teacher.model, top_n, folder, work=work, executors=executors)
    assert scored.logits is not None, "the teacher's pairs are scored"
    # [pair]: the pairs that are there, row by row; then sorted by key.
    is_scored = scored.logits.isfinite()
    query = lists.query_items[:, None].expand_as(lists.items)[is_scored]
    logits = teacher.fuse(scored.logits[is_scored].numpy(), lists.distances[is_scored].numpy())
    keys, order = (query * len(catalogue) + lists.items[is_scored]).sort()
    if len(keys) == 0:
        raise BadInput("the teacher has no pair to score; give images that have candidates")
    return TeacherLogits(keys, tensor_of(logits)[order], len(catalogue))
