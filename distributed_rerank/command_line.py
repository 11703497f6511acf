"""What every job's command line shares: parsing into a frozen dataclass, logging, one-line errors and exit
codes.

Above the procedures, below nothing but `jobs/`. Exit codes: 0 good, 2 bad input, 3 regression, 130
interrupted, anything else a failure (the traceback is shown, because it is ours to mend).
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from distributed_rerank.errors import BadInput
from distributed_rerank.extraction import ExtractionConfig
from distributed_rerank.models.concat_siamese import ConcatSiameseConfig
from distributed_rerank.models.distance_siamese import DistanceSiameseConfig
from distributed_rerank.models.extractor import ExtractorConfig, parse_args
from distributed_rerank.models.split_siamese import SplitSiameseConfig
from distributed_rerank.models.token_siamese import TokenSiameseConfig
from distributed_rerank.retrieval import RetrievalConfig
from distributed_rerank.scoring.score import ScoringConfig
from distributed_rerank.training.config import defaults_for

Arguments = TypeVar("Arguments")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractorArguments:
    """Which model turns an image into an embedding, and what it sees."""

    extractor: str | None = None
    """Any timm model, `hf-hub:` id or `local-dir:` folder, e.g. vit_small_patch16_224.dino."""
    extractor_weights: str | None = None
    """A .safetensors or .pth file; `none` for an untrained model. Default: timm's pretrained weights from the hub."""
    extractor_args: tuple[str, ...] = ()
    """Further arguments of timm.create_model, as name=value, e.g. pad_type=same."""
    image_size: int | None = None
    """Side of the square image in pixels. Default: the model's own."""
    resize: Literal["square", "crop"] = "square"
    """square: the whole image, squashed (as open-metric-learning does). crop: timm's shorter side and centre crop."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Default: the model's own."""
    mean: tuple[float, float, float] | None = None
    """Mean of each colour channel, 0 to 1. Default: the model's own."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of each colour channel. Default: the model's own."""
    normalise: bool = True
    """Scale embeddings to length one, so that L2 order is cosine order."""
    extractor_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware multiplies it natively, fp32 elsewhere."""
    images_per_block: int = 256
    """Images that are embedded as one unit of work; a killed run repeats unfinished blocks only."""
    images_per_batch: int | None = None
    """Images in one call of the extractor. Default: 8 on a CPU, 256 on a GPU."""
    threads_per_worker: int = 1
    """Threads that each worker computes with; give --cpus-per-worker as many."""
    decode_threads: int = 1
    """Threads that read images in each process."""

    def config(self) -> ExtractorConfig:
        """The extractor's own configuration. Raises BadInput where none is named or an argument is not name=value."""
        if self.extractor is None:
            raise BadInput("no extractor is named; give --extractor, e.g. --extractor vit_small_patch16_224.dino")
        if self.extractor_weights not in (None, "none") and not Path(self.extractor_weights).is_file():
            raise BadInput(f"--extractor-weights {self.extractor_weights} does not exist; give a file, or none")
        own = {field.name for field in dataclasses.fields(ExtractorConfig)}
        same = {name: value for name, value in dataclasses.asdict(self).items() if name in own}
        return ExtractorConfig(
            name=self.extractor,
            weights=self.extractor_weights,
            args=parse_args(self.extractor_args),
            precision=self.extractor_precision,
            **same,
        )

    def extraction(self) -> ExtractionConfig:
        """How the extractor is applied. Raises BadInput as `config` does."""
        return ExtractionConfig(
            extractor=self.config(),
            block_size=self.images_per_block,
            images_per_batch=self.images_per_batch,
            threads_per_worker=self.threads_per_worker,
            decode_threads=self.decode_threads,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairwiseArguments:
    """Which pairwise model is trained; its backbone is the extractor's network."""

    pairwise_model: Literal["token", "concat", "split", "distance"] = "token"
    """token: correlation of cached local tokens; concat: open-metric-learning's ConcatSiamese; split: a ViT
    whose first
    blocks run per image; distance: L2 distance of embeddings."""
    pairwise_weights: str | None = None
    """State dict of a ConcatSiamese (ours or OML's) that concat and split start from."""
    split_at: int = 8
    """split: how many blocks run per image."""
    both_orders: bool = False
    """concat and split: score both orders of a pair and average, at twice the cost."""

    def config(self, extractor: ExtractorConfig) -> Any:
        """The config of that model. Raises BadInput for an option that it does not have."""
        stacked = {"both_orders": self.both_orders, "weights": self.pairwise_weights}
        if self.pairwise_model == "concat":
            return ConcatSiameseConfig(extractor=extractor, **stacked)
        if self.pairwise_model == "split":
            return SplitSiameseConfig(extractor=extractor, split_at=self.split_at, **stacked)
        if any(stacked.values()):
            raise BadInput(
                f"--pairwise-model {self.pairwise_model} has no --both-orders and no --pairwise-weights; leave them out"
            )
        kind = TokenSiameseConfig if self.pairwise_model == "token" else DistanceSiameseConfig
        return kind(extractor=extractor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstStageArguments(ExtractorArguments):
    """Where the candidates that are re-ranked come from."""

    embeddings: Path | None = None
    """Embeddings made earlier (a folder of jobs/embed.py, or Parquet with id and embedding); images stay closed."""
    candidates: Path | None = None
    """Candidate lists of any system: Parquet, CSV (query_id, gallery_id, distance or score) or a TREC run."""
    n_items: int = 100
    """Items that exact search retrieves for each query."""

    queries_per_block: int | None = None
    """Queries that are searched for, or scored, as one unit of work. Default: 1024, and a few seconds of scoring."""
    pairs_per_batch: int | None = None
    """Pairs in one call of the pairwise model. Default: from the cost of a pair."""
    encoding_gb: float = 2.0
    """Memory for the encodings of images; beyond it they are computed in several rounds."""

    def parts(self) -> dict[str, Any]:
        """The fields of an EvaluationConfig that say where candidates come from and how pairs are scored."""
        threads = {"threads_per_worker": self.threads_per_worker}
        searched = {} if self.queries_per_block is None else {"queries_per_block": self.queries_per_block}
        return {
            "extraction": None if self.extractor is None else self.extraction(),
            "embeddings": self.embeddings,
            "candidates": self.candidates,
            "retrieval": RetrievalConfig(n_items=self.n_items, **searched, **threads),
            "scoring": ScoringConfig(
                queries_per_block=self.queries_per_block,
                pairs_per_batch=self.pairs_per_batch,
                decode_threads=self.decode_threads,
                encoding_gb=self.encoding_gb,
                **threads,
            ),
        }


Defaults = Callable[[list[str]], Any]
"""Fields whose default depends on the rest of the command line, by name."""


def parse(
    arguments: type[Arguments], manual: str, argv: list[str] | None = None, defaults: Defaults | None = None
) -> Arguments:
    """`argv` (default: the process's) as `arguments`.

    A wrong command line is BadInput in one line, with a suggestion.
    """
    argv = sys.argv[1:] if argv is None else argv
    config = (tyro.conf.AvoidSubcommands,)
    said = io.StringIO()
    try:
        with _wide_terminal(bool({"-h", "--help"} & set(argv))), contextlib.redirect_stderr(said):
            if defaults is None:
                return tyro.cli(arguments, description=manual, args=argv, config=config)
            default = _with_missing(arguments, defaults(argv))
            return tyro.cli(arguments, description=manual, args=argv, config=config, default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise BadInput(_one_line(said.getvalue())) from stop


@contextlib.contextmanager
def _wide_terminal(is_help: bool) -> Iterator[None]:
    """tyro wraps its messages at the terminal's width; one line must not be cut, the help text may be."""
    before = os.environ.get("COLUMNS")
    if not is_help:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if not is_help:
            os.environ.pop("COLUMNS")
            os.environ.update({} if before is None else {"COLUMNS": before})


def _with_missing(arguments: type[Arguments], given: dict[str, Any]) -> Arguments:
    """An instance of `arguments` with these fields; required ones stay required."""
    required = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(arguments)  # pyright: ignore[reportArgumentType]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return arguments(**{**required, **given})


def training_defaults(argv: list[str]) -> dict[str, Any]:
    """The training defaults of the pairwise model that the command line names."""
    name = PairwiseArguments().pairwise_model
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag == "--pairwise-model":
            name = value
        elif flag.startswith("--pairwise-model="):
            name = flag.partition("=")[2]
    return {"training": defaults_for(name)}


def _one_line(box: str) -> str:
    """The message of tyro's framed text: its first section, and the options that the second one suggests."""
    # frames are drawn with lines on a UTF-8 terminal, with minus signs elsewhere
    lines = [line.strip("│╭╮╰╯| ") for line in box.splitlines()]
    sections: list[list[str]] = [[]]
    for line in [line for line in lines if line][1:]:
        if line.strip("─-"):
            sections[-1].append(line)
        else:
            sections.append([])
    message, *others = [section for section in sections if section]
    if len(message) > 1 and message[0].startswith("Missing from"):
        options = [line for line in message if line.startswith("--")]
        return _misspelt(options, others) or f"required and not given: {', '.join(options)}; --help explains them"
    text = re.sub(r"^Error parsing ([\w.]+: )?", "", message[0]).rstrip(".")
    suggested = [
        name.strip(",")
        for section in others
        if section and section[0].startswith("Perhaps you meant")
        for line in section
        if line.startswith("--")
        for name in line.split()
        if name.startswith("--")
    ]
    if suggested:
        return f"{text}; perhaps you meant {' or '.join(suggested[:3])}"
    is_ours = message[0].startswith("Error parsing ") and not message[0].startswith("Error parsing --")
    return text if is_ours else f"{text}; --help lists the options"


def _misspelt(required: Sequence[str], sections: Sequence[Sequence[str]]) -> str | None:
    """An unknown flag that looks like a required one: a typo is mended before anything else is asked for."""
    unknown = [line for section in sections if section[0].startswith("Unrecognized") for line in section[1:]]
    names = [option.split()[0].removeprefix("--") for option in required]
    for flag in (line.partition("=")[0] for line in unknown if line.startswith("--")):
        if close := difflib.get_close_matches(flag.removeprefix("--"), names, n=1):
            return f"Unrecognized options: {flag}; perhaps you meant --{close[0]}"
    return None


def run(
    job: Callable[[Arguments], int | None],
    arguments: type[Arguments],
    manual: str,
    defaults: Defaults | None = None,
    argv: list[str] | None = None,
) -> None:
    """Parse the command line, run `job`, end the process with the exit code that its outcome means."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        sys.exit(job(parse(arguments, manual, argv, defaults)) or 0)
    except BadInput as error:
        # Ray re-raises a worker's error as a subclass whose text is the whole traceback; the cause is the plain line.
        line = str(getattr(error, "cause", error))
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: finished blocks are kept, the same command continues from them\n")
        sys.exit(130)
