"""One run of MLflow or W&B for a training: opened before the work, written to by whoever trains, ended with the result.

The driver opens it, with all settings as parameters, and a resumed training continues it. The worker of rank 0 adds the
figures of steps and epochs; the object travels to it. At the end come the final figures and the files of the model.
"""

import importlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_rerank.config.jobs import TrackingService
from distributed_rerank.errors import BadInput

PER_REQUEST = 100
"""Parameters that MLflow takes at once."""
LONGEST = 500
"""Characters of a parameter's value; longer ones are cut."""


@dataclass(frozen=True)
class MlflowRun:
    """A run on an MLflow server, or in a local file."""

    uri: str
    run_id: str

    @classmethod
    def opened(cls, name: str, parameters: Mapping[str, str]) -> "MlflowRun":
        """The run of this name in the environment's experiment, a new one where there is none."""
        mlflow = imported("mlflow")
        client, uri = mlflow.MlflowClient(), mlflow.get_tracking_uri()
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = client.get_experiment_by_name(wanted)
        number = client.create_experiment(wanted) if experiment is None else experiment.experiment_id
        known = client.search_runs([number], filter_string=f"tags.`mlflow.runName` = '{name}'", max_results=1)
        run = known[0] if known else client.create_run(number, run_name=name)
        client.update_run(run.info.run_id, status="RUNNING")
        given = [mlflow.entities.Param(key, value) for key, value in parameters.items()]
        for start in range(0, len(given), PER_REQUEST):
            client.log_batch(run.info.run_id, params=given[start : start + PER_REQUEST])
        return cls(uri, run.info.run_id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One metric a figure; MLflow allows no @ in names."""
        metric, now = imported("mlflow").entities.Metric, int(time.time() * 1000)
        names = {re.sub(r"[^\w./: -]", "_", name.replace("@", "_at_")): value for name, value in figures.items()}
        self._client().log_batch(self.run_id, metrics=[metric(*item, now, step) for item in names.items()])

    def add_files(self, folder: Path) -> None:
        """The folder's files as artifacts `model/...`."""
        self._client().log_artifacts(self.run_id, str(folder), "model")

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        self._client().set_terminated(self.run_id, status)

    def close(self) -> None:
        """Nothing is kept open."""

    def _client(self) -> Any:
        return imported("mlflow").MlflowClient(tracking_uri=self.uri)


@dataclass(frozen=True)
class WandbRun:
    """A run of Weights & Biases whose id is its name; one process at a time has it open."""

    name: str

    @classmethod
    def opened(cls, name: str, parameters: Mapping[str, str]) -> "WandbRun":
        """The run of this name, a new one where there is none; the next process may open it."""
        run = cls(name)
        run._run().config.update(dict(parameters), allow_val_change=True)
        run.close()
        return run

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One value a figure, each against its own `step`, for a training's runs count from 0."""
        self._run().log({**figures, "step": step})

    def add_files(self, folder: Path) -> None:
        """The folder as an artifact of type model."""
        artifact = imported("wandb").Artifact(re.sub(r"[^\w.-]", "_", self.name), type="model")
        artifact.add_dir(str(folder))
        self._run().log_artifact(artifact)

    def end(self, status: str) -> None:
        """FINISHED, or another word: then the run counts as failed."""
        self._run().finish(exit_code=int(status != "FINISHED"))

    def close(self) -> None:
        """Another process may open it."""
        self._run().finish()

    def _run(self) -> Any:
        wandb = imported("wandb")
        return wandb.run if wandb.run is not None else wandb.init(id=self.name, name=self.name, resume="allow")


ServiceRun = MlflowRun | WandbRun
KINDS: Mapping[str, type[ServiceRun]] = {"mlflow": MlflowRun, "wandb": WandbRun}


@dataclass(frozen=True)
class Part:
    """What one of a training's runs logs: its figures under its name."""

    run: ServiceRun
    name: str

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One value a figure."""
        self.run.log({f"{self.name}/{name}": value for name, value in figures.items()}, step)

    def close(self) -> None:
        """The next part may begin."""
        self.run.close()


def check_services(services: Sequence[TrackingService]) -> None:
    """Raises BadInput, before any work is done, for a service that is asked for and not installed."""
    for service in services:
        imported(service)


@contextmanager
def opened(services: Sequence[TrackingService], name: str, settings: Mapping[str, Any]) -> Iterator[list[ServiceRun]]:
    """One run of each service, with the settings as parameters; ended as the block ends."""
    parameters = {key: value[:LONGEST] for key, value in flat(settings)}
    runs = [KINDS[service].opened(name, parameters) for service in services]
    try:
        yield runs
    except BaseException as error:
        for run in runs:
            run.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    for run in runs:
        run.end("FINISHED")


def add_result(runs: Sequence[ServiceRun], chosen_on: Mapping[str, Any], folder: Path) -> None:
    """The first stage's and the chosen chain's figures on labels set aside, the gain, and the files of the model."""
    figures = {}
    if "chosen" in chosen_on:
        first = chosen_on.get("adapt", {}).get("first_stage", chosen_on["first_stage"])
        for key in ("map@10", "cmc@1"):
            before, after = first[key], chosen_on["chosen"][key]
            figures |= {f"first stage/{key}": before, f"chain/{key}": after, f"gain/{key}": after - before}
    for run in runs:
        if figures:
            run.log({f"final/{name}": value for name, value in figures.items()}, 0)
        run.add_files(folder)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def imported(name: str) -> Any:
    """The module of this name, or BadInput with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            f"tracking with {name} was asked for, but it is not installed; pip install {name} or drop it"
        ) from error
