"""Never harm: how often a chain that was chosen on labels without anything to gain loses on new ones.

    python benchmarks/never_harm.py [--labels 4 200]

Simulated catalogues of 4 to 200 train labels: points around label centres with a nuisance that labels do not explain,
and a pairwise model whose logits are noise, or know a little. Train labels are shuffled, or train and validation labels
are, or the first stage is perfect. The adapter and the chain are chosen as in `train`, and measured on 60 new labels.
`ours`: catalogues in which mAP@10 falls by more than 0.3 points, in percent; the bar is 2.
"""

import argparse
import statistics

import numpy as np
import torch
from _measuring import Row, add_common_flags, describe_machine, finish

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.choice import choose
from distributed_rerank.chain.evidence import Evidence
from distributed_rerank.chain.trials import try_chain
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.label_split import FEW_LABELS
from distributed_rerank.tensors.look_alikes import look_alike_groups
from distributed_rerank.tensors.metrics import count_relevant
from distributed_rerank.training.adaptation import choose_adaptation
from distributed_rerank.training.mining import SUSPECT_NEIGHBOURS
from distributed_rerank.training.sides import sides
from distributed_rerank.training.task import join_lists

KINDS = ("train labels shuffled", "all labels shuffled", "perfect first stage")
DIM, N_NEW, N_ITEMS, TOP_N = 24, 60, 50, 50
HARM = 0.003


class Catalogue:
    """One simulated catalogue: points and labels of the train and of the validation side."""

    def __init__(self, kind: str, seed: int, least: int = 4, most: int = 200) -> None:
        self.state = np.random.default_rng(seed)
        self.kind, self.seed = kind, seed
        n_labels = round(least * (most / least) ** self.state.random())  # evenly in the logarithm
        n_images = int(self.state.integers(3, 13))
        spread = 0.02 if kind == "perfect first stage" else float(self.state.uniform(0.5, 2.0))
        nuisance = np.exp(self.state.normal(0, 0.7, DIM))
        self.train = self._draw(n_labels, n_images, spread, nuisance)
        self.new = self._draw(N_NEW, 6, spread, nuisance)
        for side, is_shuffled in (("train", kind != KINDS[2]), ("new", kind == KINDS[1])):
            points, labels = getattr(self, side)
            setattr(self, side, (points, self.state.permutation(labels) if is_shuffled else labels))

    def _draw(self, n_labels: int, n_images: int, spread: float, nuisance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(n_labels), n_images)
        noise = self.state.standard_normal((len(labels), DIM)) * nuisance * spread
        return (self.state.standard_normal((n_labels, DIM))[labels] + noise).astype(np.float32), labels

    def harm(self) -> tuple[float, bool]:
        """Change of mAP@10 on the new labels, and whether any step was taken."""
        points, labels = self.train
        nearest_ten = lists_among(points, np.arange(len(labels)), SUSPECT_NEIGHBOURS)
        groups = look_alike_groups(nearest_ten, torch.from_numpy(labels)).numpy()
        side, alone = sides(labels, 0.5, self.seed, groups), np.full(len(labels), -1)

        def search(matrix: np.ndarray, name: str) -> tuple[CandidateLists, CandidateLists]:
            first, second = (lists_among(matrix, np.flatnonzero(side == s)) for s in (0, 1))
            return first, second

        def measure(lists: tuple[CandidateLists, CandidateLists]) -> Evidence:
            return evidence_on(join_lists(list(lists)), labels, points)

        adapted = choose_adaptation(points, labels, alone, side, search, measure, self.seed)
        known, plain = measure(adapted.lists), adapted.plain
        is_few = (adapted.step is None or plain is not None) and len(np.unique(labels)) <= FEW_LABELS
        all_labels = evidence_on(lists_among(points, np.arange(len(labels))), labels, points) if is_few else None
        unadapted = None if plain is None else measure(plain.lists)
        chain = choose(self.with_logits(known), self.seed, all_labels=all_labels, unadapted=unadapted)
        if plain is not None and not chain.is_judged_as_one:
            adapted = plain
        new_points, new_labels = self.new
        everyone = np.arange(len(new_labels))
        before = evidence_on(lists_among(new_points, everyone), new_labels, new_points)
        mapped = new_points if adapted.adapter is None else adapted.adapter(new_points)
        after = self.with_logits(evidence_on(lists_among(mapped, everyone), new_labels, mapped))
        change = (
            try_chain(after, Chain(chain.steps)).figures()["map@10"] - try_chain(before, Chain()).figures()["map@10"]
        )
        return change, adapted.step is not None or bool(chain.steps)

    def with_logits(self, evidence: Evidence) -> Evidence:
        """The evidence with logits of noise: what a model knows that was trained on shuffled labels."""
        shape = evidence.lists.items[:, :TOP_N].shape
        logits = torch.from_numpy(self.state.standard_normal(shape)).float()
        logits[evidence.lists.items[:, :TOP_N] < 0] = torch.nan
        return Evidence(evidence.lists, evidence.labels, evidence.n_relevant, logits, evidence.embeddings)


def lists_among(matrix: np.ndarray, items: np.ndarray, n_items: int = N_ITEMS) -> CandidateLists:
    """Exact lists of these items among themselves."""
    x, own = torch.from_numpy(matrix[items]), torch.from_numpy(items)
    return nearest(x, x, query_items=own, gallery_items=own, n_items=min(n_items, max(2, len(items) - 1)))


def evidence_on(lists: CandidateLists, labels: np.ndarray, points: np.ndarray) -> Evidence:
    """The lists as evidence, items numbered among themselves."""
    items = lists.query_items
    local = torch.where(lists.items >= 0, torch.searchsorted(items, lists.items.clamp(min=0)), -1)
    known, everyone = torch.from_numpy(labels)[items], torch.arange(len(items))
    n_relevant = count_relevant(everyone, known, None, everyone, known, None)
    own = CandidateLists(everyone, local, lists.distances)
    return Evidence(own, known, n_relevant, None, torch.from_numpy(points)[items])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--catalogues", type=int, default=200, help="of each kind")
    parser.add_argument("--labels", type=int, nargs=2, default=(4, 200), help="least and most train labels")
    arguments = parser.parse_args()
    print(describe_machine(), flush=True)
    rows = []
    for number, kind in enumerate(KINDS):
        n = 3 if arguments.quick else arguments.catalogues
        found = [Catalogue(kind, 1_000 * number + seed, *arguments.labels).harm() for seed in range(n)]
        changes = [change for change, _ in found]
        rows += [
            Row(f"{kind}: harmed", "%", 100 * sum(change < -HARM for change in changes) / n),
            Row(f"{kind}: a step taken", "%", 100 * sum(taken for _, taken in found) / n),
            Row(f"{kind}: mean change", "points", 100 * statistics.mean(changes)),
            Row(f"{kind}: worst", "points", 100 * min(changes)),
        ]
        print(kind, [row.ours for row in rows[-4:]], flush=True)
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
