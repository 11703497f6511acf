"""What Pillow warns of while it reads an image, as a log line that names the image."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from distributed_rerank.runtime import logs

logger = logging.getLogger(__name__)

NAMED = 10
"""Images of a process that get a line each; after them the 100th, the 1,000th and so on, with their number."""
_seen: set[str] = set()
_lock = threading.Lock()


@contextmanager
def warnings_of(image: str) -> Iterator[None]:
    """Inside, Pillow's warnings are those of `image` (its path), told once the block has ended well.

    An image that cannot be read is told with its reason by whoever rejects it. Pillow's own limit on pixels is left
    out: there is another one here.
    """
    with logs.kept_warnings() as kept:
        yield
    texts = [_line(warning) for warning in kept if not isinstance(warning, Image.DecompressionBombWarning)]
    if texts:
        _tell(image, "; ".join(dict.fromkeys(texts)))


def _tell(image: str, text: str) -> None:
    """One line for an image, however often it is read, and few for many images."""
    with _lock:
        if image in _seen:
            return
        _seen.add(image)
        n = len(_seen)
    if n <= NAMED:
        logger.warning("%r: %s; its pixels are used", image, text)
    elif set(str(n)[1:]) == {"0"} and str(n)[0] == "1":
        logger.warning("%d images with such warnings so far; the last one is %r: %s", n, image, text)


def _line(warning: Warning) -> str:
    return " ".join(str(warning).split()).rstrip(".;")
