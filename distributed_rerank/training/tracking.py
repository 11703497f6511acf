"""How a training run can be watched: TensorBoard files, and a picture at the end; `services` has MLflow and W&B.

TensorBoard's event files need no server and no account: they are written wherever `tensorboard` is installed. Only one
worker tracks.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

from markupsafe import Markup

from distributed_rerank import svg
from distributed_rerank.training.services import Part, ServiceRun

logger = logging.getLogger(__name__)

WIDTH, HEIGHT = 450, 280
"""Of one plot of the training curves."""
COLOURS = ("#2f6feb", "#d9480f", "#2b8a3e", "#9c36b5")
"""Of the runs, in turn; to be read on white and on black."""


@dataclass(frozen=True)
class Curve:
    """One line of a plot: a value for each epoch."""

    name: str
    values: Sequence[float]
    colour: str
    is_dashed: bool = False


class TensorBoardTracker:
    """Event files under `folder`; a resumed run passes its first new step, and what the killed run wrote later goes."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One scalar a figure."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the event file."""
        self.writer.close()


Tracker = TensorBoardTracker | Part


def trackers_of(folder: Path, run: str, first_step: int, services: Sequence[ServiceRun]) -> list[Tracker]:
    """What follows a run: TensorBoard where it is installed, under `folder`/tensorboard, and the services asked for."""
    has_tensorboard = find_spec("tensorboard") is not None
    events = [TensorBoardTracker(folder / "tensorboard" / run, first_step)] if has_tensorboard else []
    return [*events, *(Part(service, run) for service in services)]


def has_its_checksums(path: Path) -> bool:
    """Whether every record of an event file is as it was written; one that a kill has cut off at the end is none."""
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(path))
    try:
        while True:
            reader.GetNext()
    except OutOfRangeError:
        return True
    except DataLossError as error:
        return "truncated record" in str(error)


def copy_event_files(source: Path, target: Path) -> None:
    """All event files below `source`; damaged ones are told and left out, for nobody can compute them again."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.rglob("events.*")):
        if has_its_checksums(path):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        else:
            logger.warning("%s is damaged: TensorBoard will not show what it held", path)


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Write an SVG with the loss and, beside it, the validation figure of each epoch of each run.

    A history has one entry an epoch with `loss` and, where the run is judged, `figure` and `first_stage` (the figure
    without the model, dashed in the plot).
    """
    losses, figures = [], []
    for (name, history), colour in zip(histories.items(), cycle(COLOURS)):
        losses.append(Curve(name, [entry["loss"] for entry in history], colour))
        if history and "figure" in history[0]:
            figures.append(Curve(name, [entry["figure"] for entry in history], colour))
            figures.append(Curve("", [entry["first_stage"] for entry in history], colour, is_dashed=True))
    panels = [("training loss", losses), ("mAP@10 on labels not trained on, first stage dashed", figures)]
    drawn = [_panel(title, curves) for title, curves in panels if any(curve.values for curve in curves)]
    parts = [svg.element("g", *panel, transform=f"translate({n * WIDTH} 0)") for n, panel in enumerate(drawn)]
    description = "Training loss and validation figure by epoch; training.json has the values"
    path.write_text(f"{svg.picture(parts, WIDTH * len(parts), HEIGHT, description)}\n", encoding="utf-8")


def _panel(title: str, curves: Sequence[Curve]) -> list[Markup]:
    """One plot of curves over epochs, with their names in their colours below."""
    values = [value for curve in curves for value in curve.values]
    ticks = svg.ticks(min(values), max(values))
    n_epochs = max(len(curve.values) for curve in curves)
    frame = svg.Frame((1, n_epochs), (ticks[0], ticks[-1]), WIDTH, HEIGHT, 56, 20, 34, 60, pad=8)
    parts = [svg.text(frame.left, 18, title), *frame.grid(ticks)]
    for curve in curves:
        places = frame.points(range(1, len(curve.values) + 1), curve.values)
        style = {"stroke_dasharray": "6 4"} if curve.is_dashed else {}
        parts.append(svg.polyline(places, stroke=curve.colour, stroke_width=2, **style))
        if not curve.is_dashed:
            parts += [svg.element("circle", cx=x, cy=y, r=3, fill=curve.colour) for x, y in places]
    parts += [svg.text(frame.x(epoch), HEIGHT - 40, str(epoch), "middle") for epoch in sorted({1, n_epochs})]
    parts.append(svg.text((frame.left + WIDTH - frame.right) / 2, HEIGHT - 40, "epoch", "middle"))
    named = [curve for curve in curves if curve.name]
    step = (WIDTH - frame.left - frame.right) / len(named)
    for number, curve in enumerate(named):
        parts.append(svg.text(frame.left + number * step, HEIGHT - 12, curve.name, fill=curve.colour))
    return parts
