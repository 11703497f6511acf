"""How a folder of photos becomes a catalogue."""

from dataclasses import dataclass
from typing import Literal

from distributed_rerank.errors import BadInput, check_numbers

Layout = Literal[
    "auto",
    "folders",
    "oml",
    "imagefolder",
    "coco",
    "cvat",
    "fiftyone",
    "sop",
    "inshop",
    "cub",
    "cars",
    "market1501",
    "roxford",
    "rparis",
    "mieb",
]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What lies in the folder, and how its labels are divided."""

    layout: Layout = "auto"
    """folders: one folder a label; oml: df.csv; imagefolder: Hugging Face's metadata.csv or metadata.jsonl; coco, cvat,
    fiftyone: their exports, boxes included; the others: a data set's own files and protocol. auto: what is found."""
    label_field: str | None = None
    """The column, attribute or field that holds the label, where there are several."""
    validation_share: float = 0.5
    """Share of the labels that are set aside to measure on, above 0 to below 1; a protocol has its own."""
    split_seed: int = 0
    """Seed of that choice of labels."""

    def __post_init__(self) -> None:
        check_numbers(self, "split_seed", least=0)
        if not 0 < self.validation_share < 1:
            raise BadInput(f"validation_share={self.validation_share} is no share of the labels; give 0.5, for example")
