"""Why two photos match: which places of one look like which places of the other, drawn, and what their loss changes."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64, UInt8
from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from distributed_rerank import svg
from distributed_rerank.report.formatting import MINUS

SIDE, GAP, QUALITY = 220, 48, 80
COLOURS = ("#2f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#b08800", "#c2255c")
"""Of the pairs of places, best first; to be read on photos."""


@dataclass(frozen=True)
class Why:
    """One query and one candidate as the model sees them."""

    query: UInt8[Tensor, "3 height width"]
    candidate: UInt8[Tensor, "3 height width"]
    grid: int
    """Cells of a picture in each direction."""
    places: Int64[Tensor, "match 2"]
    """Pairs of cells, each the other's best match, most similar first; numbered row by row."""
    logit: float
    """Large = different."""
    without_places: float | None
    """The logit where the query has no such places; None where there are none."""
    without_others: float | None
    """The mean logit where it lacks as many other places."""
    candidate_id: str

    def in_words(self) -> str:
        """What the deletion test says."""
        if self.without_places is None or self.without_others is None:
            return "No place of one photo is the best match of a place of the other."
        n, step = len(self.places), self.without_places - self.logit
        carries = step > 2 * abs(self.without_others - self.logit)
        end = "these places carry the match" if carries else "the match does not hang on these places alone"
        words = (
            f"The model's logit (large = different) is {self.logit:.2f} as it is, {self.without_places:.2f} without "
            f"these {n} places of the query, {self.without_others:.2f} without as many others: {end}."
        )
        return words.replace("-", MINUS)


def drawn(why: Why) -> Markup:
    """Both pictures side by side, with a line between the places that match."""
    left, top = SIDE + GAP, 0
    parts = [_picture(why.query, 0), _picture(why.candidate, left)]
    cell = SIDE / why.grid
    for (query, candidate), colour in zip(why.places.tolist(), COLOURS, strict=False):
        (row, column), (other_row, other_column) = divmod(query, why.grid), divmod(candidate, why.grid)
        ends = []
        for x, y in ((column * cell, row * cell), (left + other_column * cell, other_row * cell)):
            style = {"fill": "none", "stroke": colour, "stroke_width": 3}
            parts.append(svg.element("rect", x=x + 2, y=top + y + 2, width=cell - 4, height=cell - 4, rx=4, **style))
            ends.append((x + cell / 2, y + cell / 2))
        parts.append(svg.line(*ends[0], *ends[1], stroke=colour, stroke_width=2, stroke_opacity="0.85"))
    words = f"{len(why.places)} places of the query and of {why.candidate_id} that look alike, joined by lines"
    return svg.picture(parts, 2 * SIDE + GAP, SIDE, words, class_="why")


def _picture(pixels: UInt8[Tensor, "3 height width"], x: int) -> Markup:
    picture = to_pil_image(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    data = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return svg.element("image", href=data, x=x, y=0, width=SIDE, height=SIDE)


def mutual(similarity: Sequence[Sequence[float]] | Tensor, most: int) -> Int64[Tensor, "match 2"]:
    """Rows and columns that are each other's largest, at most `most` of them, largest first, then by row."""
    table = torch.as_tensor(similarity)
    columns = table.argmax(dim=1)
    rows = torch.arange(len(table))
    is_mutual = table.argmax(dim=0)[columns] == rows
    pairs = torch.stack([rows, columns], dim=1)[is_mutual]
    order = table[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)[:most]
    return pairs[order]
