"""Re-rank one query at a time, in this process: what a search service calls behind its vector database."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from distributed_rerank.chain.chain import Chain, NeighbourhoodStep, QueryExpansionStep
from distributed_rerank.config.evaluation import RerankerConfig
from distributed_rerank.data.images import MAX_PIXELS
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.online.encoder import CachedEncodings, Encoder, Encoding
from distributed_rerank.online.photos import Photo
from distributed_rerank.reranking.loading import load_model_and_chain
from distributed_rerank.reranking.rankings import by_logits
from distributed_rerank.runtime.devices import InferenceThreads, pick_device, torch_threads
from distributed_rerank.scoring import plan
from distributed_rerank.storage.files import json_digest
from distributed_rerank.tensors import calibration, sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.distances import exact_distances


class Match(NamedTuple):
    """A candidate in its new place."""

    id: str
    probability: float | None
    """That it shows what the query shows; None where the chain has no calibration or did not look at the candidate."""
    distance: float
    """The chain's; small = same."""


Distances = Sequence[float] | np.ndarray
Candidate = str | tuple[str, Encoding]
"""An id that was added, or an id with what `Reranker.encode` made of its photo."""
Query = Photo | Encoding | list[Photo | Encoding]
"""One photo, or a list of photos of one thing: the mean of their logits counts."""


class Reranker:
    """A pairwise model with a cache of encodings. Any thread may call it.

    `rank` gives the order of the job `rerank` for the same lists: on AMD's CPUs with the same bits; on a GPU, and in a
    ViT on Intel's, the last bits depend on what is computed together. Chain steps behind the pairwise one look at the
    lists of all photos together, which one query does not have: they are not applied, and `left_out` names them.
    """

    def __init__(
        self,
        model: PairwiseModel,
        chain: Chain,
        *,
        cache: str | Path | None = None,
        cache_gb: float = 1.0,
        threads: int = 1,
        device: str | None = None,
        shared: bool = False,
    ) -> None:
        """Takes the model over; for the other arguments see `from_pretrained`."""
        if threads < 1:
            raise BadInput(f"threads={threads} must be at least 1")
        self.device = pick_device() if device is None else torch.device(device)
        self.chain = chain
        self.left_out = Chain(chain.neighbourhood).describe().partition(" -> ")[2]
        """The chain steps that need the lists of all photos; "" where there are none."""
        self._curve = _curve_of(chain)
        self.is_calibrated = self._curve is not None
        """Whether matches have a probability."""
        self._pairs_per_batch = plan.pairs_per_batch(model.gflop_per_pair(), self.device.type == "cuda")
        digest = json_digest(model.identity())
        self._model = model.prepare_for_inference(self.device)
        found = model.extractor.computed_with(self.device)
        identity = {"model": digest, "device": found.device, "precision": found.precision}
        self._threads = InferenceThreads(threads)
        folder = None if cache is None else Path(cache)
        budget = int(cache_gb * 10**9)
        self._encoder = Encoder(self._model, self.device, identity, folder, budget, self._threads, shared=shared)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        cache: str | Path | None = None,
        cache_gb: float = 1.0,
        chain: str | Path = "model",
        top_n: int | None = None,
        threads: int = 1,
        device: str | None = None,
        shared: bool = False,
    ) -> "Reranker":
        """The re-ranker of a folder that `train` wrote, or of the hub's `owner/name`.

        `cache` is a folder whose encodings survive a restart (None: they stay in memory), at most `cache_gb` GB.
        `chain` and `top_n` are the options of the job `rerank`. `threads` share the work of one call; they change no
        bit. `device` is torch's; default: a GPU if there is one. `shared` opens the cache beside other processes
        that do so too: it is read, and what is added stays in this process. Raises BadInput as `load_model` does, and
        for a cache that another model made or another process has open.
        """
        name = str(model)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir():
            name = f"hf-hub:{name}"
        kind: Any = chain if chain in ("model", "replace", "first_stage") else Path(chain)
        with torch_threads(1):  # two threads take the CPU time of seconds to wait for each other
            loaded, found = load_model_and_chain(RerankerConfig(model=name, chain=kind, top_n=top_n))
            assert loaded is not None, "a model was named"
            return cls(loaded, found, cache=cache, cache_gb=cache_gb, threads=threads, device=device, shared=shared)

    def __enter__(self) -> "Reranker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write the cache to disk and let another process open it."""
        self._encoder.cache.close()

    def __len__(self) -> int:
        """How many encodings are in the cache."""
        return len(self._encoder.cache)

    def add(self, ids: Iterable[str], images: Iterable[Photo]) -> dict[str, str]:
        """Encode the images that the cache does not have yet; returns the reason for each id that cannot be read.

        An image is the same as before if its path, size and time of change are, or its bytes. Where the budget is full
        the longest unused encodings give way; those of files are made again when they are needed. Raises BadInput
        where ids and images differ in number.
        """
        return self._encoder.add(ids, images)

    def encode(self, image: Photo, *, max_pixels: int = MAX_PIXELS) -> Encoding:
        """What the model keeps of a photo, for several calls of `rank`, as query or as candidate.

        Raises BadInput if it cannot be read or has more than `max_pixels` pixels.
        """
        return self._threads.map(lambda photo: self._encoder.encode(photo, max_pixels), [image])[0]

    def cached(self, id: str) -> Encoding:
        """The encoding of an id that was added, to be a query. Raises BadInput for others and for unreadable ones."""
        found = self._threads.map(self._encoder.read, [[str(id)]])[0]
        if found.unreadable:
            raise BadInput(f"image {id!r} cannot be read; add it again with another image")
        return Encoding(found.encoded[0].to(self.device), None if found.embeddings is None else found.embeddings[0])

    def token_vectors(self, encoding: Encoding) -> Float32[np.ndarray, "depth token dim"]:
        """The local tokens of a photo, for the multivectors of a database: one multivector for each depth.

        Raises BadInput for a model without tokens.
        """
        if not isinstance(self._model, TokenSiamese):
            raise BadInput(
                f"a model of kind {type(self._model).__name__} has no token vectors; train --pairwise-model token"
            )
        return self._model.token_vectors(encoding.encoded[None])[0].cpu().numpy()

    def rank(
        self,
        image: Query,
        candidates: Sequence[Candidate],
        distances: Distances | None = None,
        top_k: int | None = 10,
    ) -> list[Match]:
        """The `top_k` best candidates (None: all) of a query, best first.

        `candidates` are ids that were added, or pairs of an id and an encoding; `distances` are those of the first
        stage (small = same); without them they are those of the embeddings by the model's own extractor (their mean
        over the photos of the query). Candidates at equal distances are ordered by id; those whose image cannot be
        read are left out. Raises BadInput for an
        unreadable query, an id that was not added or comes twice, distances that are not finite or not as many as
        candidates, and where there are none and this model cannot compute them.
        """
        return self.rank_many([image], [candidates], None if distances is None else [distances], top_k)[0]

    def rank_many(
        self,
        images: Sequence[Query],
        candidates: Sequence[Sequence[Candidate]],
        distances: Sequence[Distances] | None = None,
        top_k: int | None = 10,
    ) -> list[list[Match]]:
        """`rank` of several queries, as many at a time as there are threads."""
        if len(candidates) != len(images) or (distances is not None and len(distances) != len(images)):
            raise BadInput(
                f"{len(images)} queries but {len(candidates)} lists of candidates, or another number of lists of "
                "distances; give one for each query"
            )
        if top_k is not None and top_k < 1:
            raise BadInput(f"top_k={top_k} asks for nothing; give at least 1")
        of_each = [None] * len(images) if distances is None else distances
        calls = list(zip(images, candidates, of_each, strict=True))
        return self._threads.map(lambda call: self._rank(*call)[:top_k], calls)

    def _rank(self, image: Query, candidates: Sequence[Candidate], distances: Distances | None) -> list[Match]:
        photos = image if isinstance(image, list) else [image]
        if not photos:
            raise BadInput("the query has no photo; give at least one")
        names = [str(candidate[0]) if isinstance(candidate, tuple) else str(candidate) for candidate in candidates]
        encodings = {str(candidate[0]): candidate[1] for candidate in candidates if isinstance(candidate, tuple)}
        given = None if distances is None else _checked(distances, len(names))
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise BadInput(f"candidate {twice!r} comes twice; give each id once")
        queries = [photo if isinstance(photo, Encoding) else self._encoder.encode(photo) for photo in photos]
        if not names:
            return []
        found = self._encoder.read(names, encodings)
        near = self._distances(queries, found.embeddings, len(names)) if given is None else given
        # [1, candidate]: places in `names` by (distance, id); they are the items of the list.
        keys = near.tolist()
        places = torch.tensor(sorted(range(len(names)), key=lambda place: (keys[place], names[place])))
        lists = CandidateLists(torch.zeros(1, dtype=torch.int64), places[None], near[places][None])
        lists, is_scored = self._reordered(queries, found, names, lists)
        return self._matches(names, lists, is_scored)

    def _reordered(
        self, queries: Sequence[Encoding], found: CachedEncodings, names: Sequence[str], lists: CandidateLists
    ) -> tuple[CandidateLists, Bool[Tensor, " candidate"]]:
        """The list behind the pairwise step, without unreadable candidates; and whether each candidate has a logit."""
        step, logits = self.chain.pairwise, None
        if step is not None:
            head = lists.first(step.top_n)
            logits = self._logits(queries, found.encoded[head.items[0]], head.distances[0])[None]
        if found.unreadable:
            is_gone = torch.tensor([name in found.unreadable for name in names])
            n_logits = 0 if logits is None else logits.shape[1]
            lists, columns = lists.without(is_gone[lists.items])
            if logits is not None:
                # [1, candidate]: a logit moves with its candidate; NaN for those that moved up from behind.
                padded = torch.nn.functional.pad(logits, (0, len(names) - n_logits), value=torch.nan)
                logits = padded.gather(1, columns)[:, :n_logits]
        is_scored = torch.full((len(names),), step is None)
        if step is not None and logits is not None:
            has_logit = logits.isfinite() & (lists.items[:, : logits.shape[1]] >= 0)
            is_scored[lists.items[:, : logits.shape[1]][has_logit]] = True
            lists = by_logits(step, lists, logits)
        return lists, is_scored

    def _matches(self, names: Sequence[str], lists: CandidateLists, is_scored: Tensor) -> list[Match]:
        """The candidates of a list of one row, in its order."""
        is_there = lists.items[0] >= 0
        items, distances = lists.items[0][is_there], lists.distances[0][is_there]
        probable: list[float | None] = [None] * len(items)
        if self._curve is not None:
            # Rounded to float32, as the table of the job `rerank` has them.
            of_all = calibration.probability(distances, self._curve).float().tolist()
            probable = [p if scored else None for p, scored in zip(of_all, is_scored[items].tolist(), strict=True)]
        placed = zip(items.tolist(), probable, distances.tolist(), strict=True)
        return [Match(str(names[item]), probability, distance) for item, probability, distance in placed]

    def _logits(self, queries: Sequence[Encoding], candidates: Tensor, distances: Tensor) -> Float32[Tensor, " pair"]:
        """The mean logit of each candidate over the photos of the query. Raises BadInput where one is not finite."""
        encoded, near = candidates.to(self.device), distances.to(self.device)
        total = torch.zeros(len(candidates), dtype=torch.float64)
        for query in queries:
            parts = []
            for start, stop in sharding.blocks(len(encoded), self._pairs_per_batch):
                of_query = query.encoded.expand(stop - start, *query.encoded.shape)
                parts.append(self._model(of_query, encoded[start:stop], near[start:stop]).float().cpu())
            total += torch.cat(parts).double()
        logits = (total / len(queries)).float()
        if not bool(logits.isfinite().all()):
            raise BadInput(
                "the pairwise model gives logits that are not finite; train it again, or with precision fp32"
            )
        return logits

    def _distances(
        self, queries: Sequence[Encoding], embeddings: Tensor | None, n_candidates: int
    ) -> Float32[Tensor, " candidate"]:
        """The first-stage distances by the model's own embeddings, the mean over the photos of the query."""
        step = self.chain.pairwise
        if embeddings is None and step is not None and step.rule == "replace":
            return torch.zeros(n_candidates)  # such a model does not look at distances, nor does this rule
        if embeddings is None:
            raise BadInput("this model computes no distances of its own; give rank() those of the first stage")
        total = torch.zeros(n_candidates, dtype=torch.float64)
        for query in queries:
            assert query.embedding is not None, "a model with embeddings has one of the query"
            total += exact_distances(query.embedding.expand_as(embeddings), embeddings).double()
        return (total / len(queries)).float()


def _curve_of(chain: Chain) -> calibration.Logistic | None:
    """From a distance behind the pairwise step to the probability of a match; None where nothing was fitted to it."""
    if not chain.neighbourhood:
        fitted = chain.calibration
        return calibration.Logistic(fitted["slope"], fitted["intercept"]) if fitted else None
    following = chain.neighbourhood[0]
    if isinstance(following, NeighbourhoodStep | QueryExpansionStep):
        return calibration.Logistic(following.slope, following.intercept)
    return None


def _checked(distances: Distances, n_candidates: int) -> Float32[Tensor, " candidate"]:
    """The distances as float32."""
    near = torch.from_numpy(np.array(distances, np.float32))
    if near.shape != (n_candidates,):
        raise BadInput(f"{n_candidates} candidates but distances of shape {tuple(near.shape)}; give one for each")
    if not bool(near.isfinite().all()):
        raise BadInput(f"a distance is {float(near[~near.isfinite()][0])}; give finite numbers")
    return near
