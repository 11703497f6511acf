"""A folder of photos -> a catalogue."""

from pathlib import Path

from distributed_rerank.config.jobs import MakeCatalogueJob
from distributed_rerank.importing.catalogue import import_folder, log_summary


def main(job: MakeCatalogueJob, folder: Path) -> None:
    """Write the catalogue of a folder to the file --out."""
    log_summary(import_folder(folder, job.out, job.importing, overwrite=job.overwrite), folder, job.out)
