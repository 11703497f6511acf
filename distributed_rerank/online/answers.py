"""The answer of a `Reranker` to a client's request."""

from typing import Any

from distributed_rerank.errors import BadInput
from distributed_rerank.online.requests import RerankRequest
from distributed_rerank.online.reranker import Candidate, Match, Reranker


def answer(reranker: Reranker, request: RerankRequest, max_pixels: int) -> list[dict[str, Any]]:
    """The results, best first, each with the `index` of its document, `relevance_score` (large = same) and `distance`.

    The score is the probability of a match where the chain has a calibration, 0 for documents behind the chain's
    `top_n`, which the model does not look at; without a calibration it is minus the distance. Cached documents whose
    image cannot be read have no result. Raises BadInput as `Reranker.rank` and `Reranker.encode` do.
    """
    query = request.query
    asked = reranker.cached(query) if isinstance(query, str) else reranker.encode(query, max_pixels=max_pixels)
    candidates: list[Candidate] = []
    for index, document in enumerate(request.documents):
        if isinstance(document, str):
            candidates.append(document)
            continue
        try:
            # A name that no id has; images at equal distances keep their order.
            candidates.append((f"\0{index:09d}", reranker.encode(document, max_pixels=max_pixels)))
        except BadInput as error:
            raise BadInput(f"document {index}: {error}") from error
    matches = reranker.rank(asked, candidates, request.distances, request.top_n)
    places = {candidate if isinstance(candidate, str) else candidate[0]: i for i, candidate in enumerate(candidates)}
    is_calibrated = reranker.is_calibrated
    return [
        {"index": places[match.id], "relevance_score": _score(match, is_calibrated), "distance": match.distance}
        for match in matches
    ]


def _score(match: Match, is_calibrated: bool) -> float:
    return (match.probability or 0.0) if is_calibrated else -match.distance
