"""The steps that many devices share, bound to a session. Layer 4."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from distributed_rerank.cluster import extraction, retrieval, scoring, training
from distributed_rerank.cluster.session import Session, connect
from distributed_rerank.config.cluster import ClusterConfig, RetryConfig
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.executors import Executors
from distributed_rerank.extraction import Block, EmbeddedBlock
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.training.task import Fit


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

    def extract(
        blocks: Sequence[Block], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        build_extractor(config)  # a wrong name or wrong weights must not cost a start of Ray
        return extraction.extract(blocks, config, work, session=connected())

    return Executors(
        extract=extract,
        search=lambda *given: retrieval.search(*given, session=connected()),
        score=lambda *given: scoring.score(*given, session=connected()),
    )


def fit_on(session: Callable[[], Session], retry: RetryConfig) -> Fit:
    """Training on the workers of the session."""
    return lambda task, folder: training.fit(task, folder, session=session(), retry=retry)
