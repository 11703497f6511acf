"""Read and check what a job gets, before torch, timm or ray is imported: files that are absent, broken tables."""

import re
from dataclasses import replace
from functools import singledispatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distributed_rerank.config.evaluation import RerankerConfig
from distributed_rerank.config.jobs import (
    CatalogueJob,
    CompareJob,
    DemoJob,
    EmbedJob,
    EvaluateJob,
    ExportJob,
    LabelledJob,
    MakeCatalogueJob,
    MeasuringJob,
    QueriesJob,
    RerankJob,
    ServeJob,
    SubmitJob,
    TrainExtractorJob,
    TrainJob,
    VerifyJob,
)
from distributed_rerank.errors import BadInput
from distributed_rerank.storage.paths import scheme_of

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
    check_model(RerankerConfig(model=job.model, allow_hub=job.allow_hub))
    if job.out.exists():
        raise BadInput(f"--out {job.out} exists; give another folder")
    return ()


@read_inputs.register
def _(job: CompareJob) -> Inputs:
    if len(job.results) < 2:
        raise BadInput(f"{len(job.results)} result is nothing to compare; give two or more folders of `evaluate`")
    for path in job.results:
        if not path.exists():
            raise BadInput(f"{path} does not exist; give folders of `evaluate` and files with lists, on this machine")
        if path.is_file() and job.catalogue is None:
            raise BadInput(f"{path} is a file with lists: give the --catalogue that says what is relevant")
    without_effect = {"judgements": job.judgements, "missing_lists": job.missing_lists}
    given = [f"--{name.replace('_', '-')}" for name, value in without_effect.items() if value is not None]
    if given and not any(path.is_file() for path in job.results):
        raise BadInput(f"{given[0]} has no effect: no file with lists is compared; leave it out")
    if job.catalogue is None:
        return (None,)
    check_exists(job.catalogue)
    from distributed_rerank.data.catalogue_files import read_catalogue

    return (judged(job, read_catalogue(job.catalogue, purpose="evaluation", allow_shared_labels=True)),)


@read_inputs.register
def _(job: ServeJob) -> Inputs:
    absent = [name for name in ("fastapi", "uvicorn", "starlette") if find_spec(name) is None]
    if absent and job.cluster.num_workers != 0:
        raise BadInput(
            f"serve needs Ray Serve ({', '.join(absent)} not found): pip install 'distributed-rerank[serve]', or give "
            "--num-workers 0"
        )
    check_model(RerankerConfig(model=job.model, allow_hub=job.allow_hub))
    if isinstance(job.chain, Path) and not job.chain.is_file():
        raise BadInput(f"--chain {job.chain} does not exist; check the path")
    if job.cache is not None and re.match(r"\w+:/", str(job.cache)):
        raise BadInput(f"--cache {job.cache} is mapped into memory; give a folder on this machine")
    if (job.catalogue is None) != (job.cache is None):
        raise BadInput("--catalogue and --cache go together: the images of one are encoded into the other")
    token = job.serving.token()
    if job.catalogue is None:
        return [], token
    check_exists(job.catalogue)
    from distributed_rerank.data.catalogue_files import read_catalogue

    return read_catalogue(job.catalogue, image_roots=job.image_root).images(), token


@read_inputs.register
def _(job: VerifyJob) -> Inputs:
    if not (job.folder / "golden.safetensors").is_file():
        raise BadInput(f"--folder {job.folder} is no export: it has no golden.safetensors; give a folder of `export`")
    return ()


@read_inputs.register
def _(job: EmbedJob) -> Inputs:
    job.extractor.check_files()
    if job.adapt is not None and not (job.adapt / "adapter.safetensors").is_file():
        raise BadInput(f"--adapt {job.adapt} has no adapter.safetensors; give a model folder whose chain adapts")
    catalogue = read_table(job)
    return (catalogue if job.split is None else catalogue.restrict(job.split),)


@read_inputs.register
def _(job: TrainJob) -> Inputs:
    job.pairwise.extractor.check_files()
    return (read_table(job, purpose="training"),)


@read_inputs.register
def _(job: TrainExtractorJob) -> Inputs:
    job.extractor.check_files()
    return (read_table(job, purpose="training"),)


@read_inputs.register
def _(job: MeasuringJob) -> Inputs:
    job.first_stage.check_files()
    check_model(job.reranker)
    baseline = job.baseline if isinstance(job, EvaluateJob) else None
    if baseline is not None and not baseline.is_dir():
        raise BadInput(f"--baseline {baseline} is no folder; give one that `evaluate` wrote")
    table = read_table(job, purpose="evaluation")
    catalogue = judged(job, table)
    from distributed_rerank.data.relevance import check_measurable

    check_measurable(catalogue)
    if job.measure.external is not None:
        from distributed_rerank.data.candidate_files import read_candidates

        read_candidates(job.measure.external, catalogue)
    is_train = (table.table["split"] == "train").to_numpy(dtype=bool) & (job.split != "train")
    return catalogue, table.take(is_train.nonzero()[0])


@read_inputs.register
def _(job: RerankJob) -> Inputs:
    if job.reranker.model is None:
        raise BadInput("required and not given: --model; give a folder that `train` wrote")
    job.first_stage.check_files()
    check_model(job.reranker)
    if job.expect_from is not None and not job.expect_from.is_dir():
        raise BadInput(f"--expect-from {job.expect_from} is no folder; give one that `evaluate` wrote")
    if job.query_catalogue is None:
        return (read_table(job).as_query_and_gallery(),)
    from distributed_rerank.data.catalogue_files import read_query_gallery

    for table in (job.query_catalogue, job.catalogue):
        check_exists(table)
    return (read_query_gallery(job.query_catalogue, job.catalogue, image_roots=job.image_root),)


def judged(job: QueriesJob, table: Any) -> Any:
    """The split of the catalogue that is measured, with the judgements that take the place of its labels, if any."""
    catalogue = table.restrict(job.split)
    if job.judgements is None:
        return catalogue
    from distributed_rerank.data.judgement_files import read_judgements

    return replace(catalogue, judgements=read_judgements(job.judgements, *catalogue.roles()))


def read_table(job: CatalogueJob, purpose: Any = "images") -> Any:
    """The catalogue of the job. A missing file is told before pandas is imported."""
    check_exists(job.catalogue)
    from distributed_rerank.data.catalogue_files import read_catalogue

    is_allowed = isinstance(job, LabelledJob) and job.allow_shared_labels
    return read_catalogue(job.catalogue, purpose=purpose, allow_shared_labels=is_allowed, image_roots=job.image_root)


def check_exists(location: str) -> None:
    """Raises BadInput for a local table that is no file."""
    if scheme_of(location) is None and not Path(location).is_file():
        what = "is a folder; name the table in it" if Path(location).is_dir() else "does not exist; check the path"
        raise BadInput(f"--catalogue {location} {what}")


def check_model(config: RerankerConfig) -> None:
    """Raises BadInput for a local model folder without its files, and for one on the hub without leave."""
    config.check_hub()
    model = config.model
    if model is None or model.startswith("hf-hub:"):
        return
    for name in ("config.json", "model.safetensors"):
        if not (Path(model) / name).is_file():
            raise BadInput(f"--model {model} is no saved pairwise model: it has no {name}; give a folder of `train`")
