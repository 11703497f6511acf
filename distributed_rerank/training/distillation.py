"""A slow pairwise model as the teacher of a fast one: it scores the mined lists once, the student learns from that.

The teacher's order is that of its own chain: where the chain fuses the logit with the first-stage distance, so does the
teacher here. The scoring stage keeps the logits, so a stopped training scores no pair twice.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from distributed_rerank.chain.chain import PairwiseStep, read_chain
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model, local_folder
from distributed_rerank.models.weights import digest_of_state
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.scoring.rounds import ScoreExecutors
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.storage.files import file_digest
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.pair_values import PairValues
from distributed_rerank.training.plan import is_list_loss

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class TableTeacher:
    """Another system's scores of pairs in a file: of whatever pairs it has, one label's or another's."""

    path: Path

    def fingerprint(self) -> dict[str, Any]:
        """The file's content."""
        return {"scores": file_digest(self.path)}

    def logits(self, catalogue: Catalogue, lists: CandidateLists) -> PairValues:
        """The distances (or negated scores) of all its pairs. Raises BadInput where it has no pair of these lists."""
        given = read_candidates(self.path, catalogue)
        found = PairValues.of_lists(given, given.distances, len(catalogue))
        queries = lists.query_items[:, None].expand_as(lists.items)
        n_known, n_mined = int(found.look_up(queries, lists.items).isfinite().sum()), int((lists.items >= 0).sum())
        if not n_known:
            raise BadInput(f"--teacher {self.path} scores none of the {n_mined:,} mined pairs; score train's lists")
        logger.info("the teacher's table has scores of %d of %d mined pairs", n_known, n_mined)
        return found


def read_teacher(place: str | Path) -> Teacher | TableTeacher:
    """The model in a folder of the training stage, with its chain's fusion, or the scores in a file.

    Raises BadInput as `load_model` does.
    """
    if Path(place).is_file():
        return TableTeacher(Path(place))
    path = local_folder(place)
    model = load_model(path)
    fusion = read_chain(path).pairwise if (path / "chain.json").is_file() else None
    return Teacher(model, fusion if fusion is not None and fusion.rule == "fuse" else None)


def check_teachable(config: TrainingConfig, teacher: Teacher | TableTeacher | None) -> None:
    """Raises BadInput for a loss or mining that cannot use the teacher, where there is one."""
    if teacher is not None and (not is_list_loss(config.loss) or config.mining != "lists"):
        raise BadInput(
            f"a teacher orders lists, and loss={config.loss} with mining={config.mining} has none; "
            "take --loss listwise --mining lists, or leave --teacher out"
        )


def score_by_teacher(
    teacher: Teacher | TableTeacher,
    catalogue: Catalogue,
    lists: CandidateLists,
    folder: Path,
    work: WorkConfig,
    executors: ScoreExecutors | None,
) -> PairValues:
    """The teacher's logits of all pairs of the lists, kept in `folder`. Raises BadInput where there is no pair."""
    if isinstance(teacher, TableTeacher):
        return teacher.logits(catalogue, lists)
    # The teacher's logits decide the weights, so blocks and batches are the defaults whatever the job's are.
    work = WorkConfig(max_rejects=work.max_rejects, encoding_gb=work.encoding_gb, decode_threads=work.decode_threads)
    top_n = lists.items.shape[1]
    scored = score_candidates(catalogue, lists, teacher.model, top_n, folder, work=work, executors=executors)
    assert scored.logits is not None, "the teacher's pairs are scored"
    logits = tensor_of(teacher.fuse(scored.logits.numpy(), lists.distances.numpy()))
    found = PairValues.of_lists(lists, logits, len(catalogue), scored.logits.isfinite())
    if not len(found):
        raise BadInput("the teacher has no pair to score; give images that have candidates")
    return found
