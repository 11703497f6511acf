"""What a training run shows while it runs and after it: TensorBoard files, a picture, MLflow or W&B on
request.

TensorBoard's event files are always written: they need no server and no account. Layer 3; used by one worker
only.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from distributed_rerank.config.jobs import TrackingService
from distributed_rerank.errors import BadInput

logger = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Takes figures by name as training goes on."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Records the figures of this step; steps ascend."""
        ...

    def close(self) -> None:
        """Flushes; nothing is logged afterwards."""
        ...


class TensorBoardTracker:
    """Event files under `folder`. A resumed run passes its first new step: later ones of the killed run
    go."""

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


class MlflowTracker:
    """One MLflow run, found again by its name, so that a resumed training continues it."""

    def __init__(self, run_name: str) -> None:
        self.mlflow = imported("mlflow")
        known = self.mlflow.search_runs(filter_string=f"tags.`mlflow.runName` = '{run_name}'", output_format="list")
        if known:
            self.mlflow.start_run(run_id=known[0].info.run_id)
        else:
            self.mlflow.start_run(run_name=run_name)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One metric a figure; MLflow allows no @ in names."""
        self.mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self.mlflow.end_run()


class WandbTracker:
    """One Weights & Biases run whose id is the run's name, so that a resumed training continues it."""

    def __init__(self, run_name: str) -> None:
        self.run = imported("wandb").init(id=run_name, name=run_name, resume="allow")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One value a figure."""
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


def check_services(services: Sequence[TrackingService]) -> None:
    """Raises BadInput, before any work is done, for a service that is asked for and not installed."""
    for service in services:
        imported(service)


def open_trackers(
    folder: Path, services: Sequence[TrackingService] = (), run_name: str = "", first_step: int = 0
) -> list[Tracker]:
    """TensorBoard under `folder` and the services asked for; a resumed run names its first new step."""
    make: dict[str, Callable[[str], Tracker]] = {"mlflow": MlflowTracker, "wandb": WandbTracker}
    return [TensorBoardTracker(folder, first_step), *(make[service](run_name) for service in services)]


def imported(name: str) -> Any:
    """The module of this name, or BadInput with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            f"tracking with {name} was asked for, but it is not installed; pip install {name} or drop it"
        ) from error


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """A PNG with the loss and the validation figure of each epoch of each run.

    A history has one entry an epoch with `loss` and, where the run is judged, `figure` and `first_stage` (the
    figure without the model).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = picture.subplots(1, 2)
    for name, history in histories.items():
        epochs = range(1, len(history) + 1)
        (line,) = left.plot(epochs, [entry["loss"] for entry in history], marker=".", label=name)
        if history and "figure" in history[0]:
            style = {"color": line.get_color()}
            right.plot(epochs, [entry["figure"] for entry in history], marker=".", label=name, **style)
            first_stage = [entry["first_stage"] for entry in history]
            right.plot(epochs, first_stage, linestyle="--", label=f"{name}, first stage", **style)
    left.set(title="training loss", xlabel="epoch")
    right.set(title="mAP@10 on labels not trained on", xlabel="epoch")
    for side in (left, right):
        side.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(picture).print_png(path)
