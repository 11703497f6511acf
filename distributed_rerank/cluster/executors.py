"""The work that many devices share, done by the workers of a Ray session."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from distributed_rerank.cluster import extraction, retrieval, scoring
from distributed_rerank.cluster.session import Session, connect
from distributed_rerank.config.cluster import ClusterConfig


@contextmanager
def connect_when_needed(config: ClusterConfig) -> Iterator[Callable[[], Session]]:
    """A function that gives the session, and connects at its first call.

    Wrong input is then found before Ray starts, and a run with nothing left to do starts none.
    """
    with ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(connect(config)))


class RayExecutors:
    """Embeds, searches and scores on the workers of the session that `session` gives when it is first needed."""

    def __init__(self, session: Callable[[], Session]) -> None:
        self.embed_blocks = partial(extraction.embed_blocks, session)
        self.search_blocks = partial(retrieval.search_blocks, session)
        self.score_blocks = partial(scoring.score_blocks, session)
