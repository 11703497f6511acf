"""The steps that many devices share, bound to a session. Layer 4."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from distributed_rerank.cluster import extraction, retrieval, scoring
from distributed_rerank.cluster.session import ClusterConfig, Session, connect
from distributed_rerank.extraction import Block, EmbeddedBlock, ExtractionConfig
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.reranking.first_stage import Executors


@contextmanager
def connect_when_needed(config: ClusterConfig) -> Iterator[Callable[[], Session]]:
    """A function that gives the session, and connects at its first call.

    Wrong input is then found before Ray starts, and a run with nothing left to do starts none.
    """
    with ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(connect(config)))


def executors_on(session: Session | Callable[[], Session]) -> Executors:
    """Extraction, search and scoring on the workers of `session`, or of the one that the function gives."""

    def connected() -> Session:
        return session() if callable(session) else session

    def extract(blocks: Sequence[Block], config: ExtractionConfig) -> Iterator[tuple[int, EmbeddedBlock]]:
        build_extractor(config.extractor)  # a wrong name or wrong weights shall not cost a start of Ray
        return extraction.extract(blocks, config, session=connected())

    return Executors(
        extract=extract,
        search=lambda *given: retrieval.search(*given, session=connected()),
        score=lambda *given: scoring.score(*given, session=connected()),
    )
