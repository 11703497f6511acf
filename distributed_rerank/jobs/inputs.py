"""Read and check what a job gets, before torch, timm or ray is imported: files that are absent, broken tables."""

from functools import singledispatch
from pathlib import Path
from typing import Any

from distributed_rerank.config.jobs import (
    DemoJob,
    EmbedJob,
    EvaluateJob,
    ExportJob,
    MakeCatalogueJob,
    MeasuringJob,
    RerankJob,
    SubmitJob,
    TrainExtractorJob,
    TrainJob,
    VerifyJob,
)
from distributed_rerank.data.locations import scheme_of
from distributed_rerank.errors import BadInput

Inputs = tuple[Any, ...]
"""What the job's `main` takes beside the job."""


@singledispatch
def read_inputs(job: Any) -> Inputs:
    """The checked inputs of a job: its catalogue, if it has one. Raises BadInput naming the value and the fix."""
    raise NotImplementedError(f"{type(job).__name__} is no job")


@read_inputs.register(SubmitJob)
@read_inputs.register(DemoJob)
def _(job: Any) -> Inputs:
    return ()


@read_inputs.register
def _(job: MakeCatalogueJob) -> Inputs:
    if not job.folder.is_dir():
        raise BadInput(f"{job.folder} is no folder; give the folder of the photos")
    return (job.folder,)


@read_inputs.register
def _(job: ExportJob) -> Inputs:
    check_model(job.model)
    if job.out.exists():
        raise BadInput(f"--out {job.out} exists; give another folder")
    return ()


@read_inputs.register
def _(job: VerifyJob) -> Inputs:
    if not (job.folder / "golden.safetensors").is_file():
        raise BadInput(f"--folder {job.folder} is no export: it has no golden.safetensors; give a folder of `export`")
    return ()


@read_inputs.register
def _(job: EmbedJob) -> Inputs:
    job.extractor.check_files()
    catalogue = read_table(job.catalogue)
    return (catalogue if job.split is None else catalogue.restrict(job.split),)


@read_inputs.register
def _(job: TrainJob) -> Inputs:
    job.pairwise.extractor.check_files()
    return (read_table(job.catalogue, purpose="training", allow_shared_labels=job.allow_shared_labels),)


@read_inputs.register
def _(job: TrainExtractorJob) -> Inputs:
    job.extractor.check_files()
    return (read_table(job.catalogue, purpose="training", allow_shared_labels=job.allow_shared_labels),)


@read_inputs.register
def _(job: MeasuringJob) -> Inputs:
    job.first_stage.check_files()
    check_model(job.reranker.model)
    baseline = job.baseline if isinstance(job, EvaluateJob) else None
    if baseline is not None and not baseline.is_dir():
        raise BadInput(f"--baseline {baseline} is no folder; give one that `evaluate` wrote")
    table = read_table(job.catalogue, purpose="evaluation", allow_shared_labels=job.allow_shared_labels)
    catalogue = table.restrict(job.split)
    from distributed_rerank.data.relevance import check_measurable

    check_measurable(catalogue)
    return (catalogue,)


@read_inputs.register
def _(job: RerankJob) -> Inputs:
    if job.reranker.model is None:
        raise BadInput("required and not given: --model; give a folder that `train` wrote")
    job.first_stage.check_files()
    check_model(job.reranker.model)
    if job.query_catalogue is None:
        return (read_table(job.catalogue).as_query_and_gallery(),)
    from distributed_rerank.data.catalogue import read_query_gallery

    for table in (job.query_catalogue, job.catalogue):
        check_exists(table)
    return (read_query_gallery(job.query_catalogue, job.catalogue),)


def read_table(location: str, purpose: Any = "images", allow_shared_labels: bool = False) -> Any:
    """The catalogue at `location`. A missing file is told before pandas is imported."""
    check_exists(location)
    from distributed_rerank.data.catalogue import read_catalogue

    return read_catalogue(location, purpose=purpose, allow_shared_labels=allow_shared_labels)


def check_exists(location: str) -> None:
    """Raises BadInput for a local table that is no file."""
    if scheme_of(location) is None and not Path(location).is_file():
        raise BadInput(f"--catalogue {location} does not exist; check the path")


def check_model(model: str | None) -> None:
    """Raises BadInput for a local model folder without its files."""
    if model is None or model.startswith("hf-hub:"):
        return
    for name in ("config.json", "model.safetensors"):
        if not (Path(model) / name).is_file():
            raise BadInput(f"--model {model} is no saved pairwise model: it has no {name}; give a folder of `train`")
