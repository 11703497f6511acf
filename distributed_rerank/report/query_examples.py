"""Which queries a report shows as strips of images, and the thumbnails in them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float64
from PIL import Image

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import UnreadableImage, read_image
from distributed_rerank.report.why import Why

SHOWN_PER_GROUP = 6
SHOWN_CANDIDATES = 8
THUMBNAIL_SIDE = 160
THUMBNAIL_QUALITY = 78


class Candidate(NamedTuple):
    """One retrieved image at its place in a list."""

    image: ImageRef
    is_relevant: bool
    words: str
    """How near it is: its distance, or the probability of a match; "" where neither says much."""


@dataclass(frozen=True)
class Strip:
    """A query and its first candidates, best first; `after` is empty where nothing was re-ranked."""

    query: ImageRef
    before: Sequence[Candidate]
    after: Sequence[Candidate]
    why: Why | None = None
    """Why the first candidate stands there."""


class ChosenQueries(NamedTuple):
    """Ids of the queries worth looking at. No query is in two groups."""

    improved: list[str]
    damaged: list[str]
    missed: list[str]


def choose_queries(per_query: pd.DataFrame, n_shown: int = SHOWN_PER_GROUP) -> ChosenQueries:
    """The `n_shown` queries that gained most, that lost most, and that never had a correct candidate in first place.

    Gain is the change in the reciprocal rank of the first relevant candidate (0 where there is none). Missed queries
    come worst first; ties by query id. A table of the first stage alone has missed ones only.
    """
    ids = per_query["query_id"].astype(str).to_numpy(dtype=object)
    before = _reciprocal_ranks(per_query, "first_hit_before")
    after = _reciprocal_ranks(per_query, "first_hit_after") if is_reranked(per_query) else before
    gain = after - before
    improved = _first(ids, -gain, gain > 0, n_shown)
    damaged = _first(ids, gain, gain < 0, n_shown)
    is_missed = (before < 1) & (after < 1) & ~np.isin(ids, [*improved, *damaged])
    return ChosenQueries(improved, damaged, _first(ids, after, is_missed, n_shown))


def is_reranked(per_query: pd.DataFrame) -> bool:
    """Whether the table has metrics after re-ranking."""
    return "first_hit_after" in per_query.columns and any(str(name).endswith("@10_after") for name in per_query.columns)


def values_of(per_query: pd.DataFrame, column: str) -> Float64[np.ndarray, " query"]:
    """One numeric column; NaN where it is null."""
    return np.asarray(per_query[column].array.to_numpy(dtype=np.float64, na_value=np.nan))


def _reciprocal_ranks(per_query: pd.DataFrame, column: str) -> Float64[np.ndarray, " query"]:
    return np.nan_to_num(1.0 / values_of(per_query, column), nan=0.0)


def _first(ids: np.ndarray, keys: np.ndarray, is_eligible: np.ndarray, count: int) -> list[str]:
    order = np.lexsort((ids[is_eligible].astype(str), keys[is_eligible]))
    return [str(name) for name in ids[is_eligible][order[:count]]]


def file_link(image: ImageRef) -> str:
    """Where a browser finds the picture itself; "" for a store that it cannot read."""
    scheme, separator, _ = image.path.partition("://")
    if separator:
        return image.path if scheme in ("http", "https") else ""
    return Path(image.path).absolute().as_uri()


def thumbnail(image: ImageRef) -> str | None:
    """A JPEG data URI of at most 160 x 160 pixels, or None where the image cannot be read any more."""
    try:
        picture = read_image(image)
    except UnreadableImage:
        return None
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
