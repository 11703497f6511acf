"""The command `distributed-rerank JOB ...`: parse, check, import what the job needs, run it, end with its exit code.

Nothing here imports torch, timm or ray, so that help, a typo, a missing file and a broken catalogue are answered at
once. Exit codes: 0 good, 2 bad input, 3 regression, 75 a service that does not answer, 130 interrupted, anything else
a failure (the traceback is shown, because it is ours to mend).
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import os
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any

import tyro

from distributed_rerank import __version__
from distributed_rerank.config.jobs import JOBS
from distributed_rerank.config.options import Option, configs_in, flags_in, options_of
from distributed_rerank.config.own import is_own
from distributed_rerank.config.pairwise import PAIRWISE_CONFIGS, pairwise_config
from distributed_rerank.config.training import EXTRACTOR_DEFAULTS, defaults_for
from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.runtime import logs

PROGRAM = "distributed-rerank"
FIRST_OPTIONS: Mapping[str, str] = {
    "catalogue": "out layout label-field validation-share split-seed overwrite",
    "embed": "catalogue out extractor extractor-weights extractor-args image-size split num-workers overwrite",
    "train": "catalogue out extractor extractor-weights image-size pairwise-model embeddings epochs minutes overwrite",
    "train-extractor": "catalogue out extractor extractor-weights image-size epochs backbone-lr minutes num-workers",
    "evaluate": "catalogue out model extractor extractor-weights image-size embeddings candidates split num-workers",
    "rerank": "catalogue candidates model out query-catalogue embeddings extractor top-n num-workers overwrite",
    "compare": "out catalogue split missing-lists seed overwrite",
    "serve": "catalogue cache cache-gb host port token-file num-workers metrics-port",
    "export": "model out",
    "verify": "folder",
    "scheduled-evaluation": "catalogue model history runs run-id baseline metric tolerance extractor num-workers",
    "submit": "submission-id address working-dir",
    "demo": "out num-workers",
}  # fmt: skip
"""The options that most people need first, shown by --help; --help-all shows the rest."""
_TYRO = (tyro.conf.AvoidSubcommands,)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job that `argv` (default: the process's words) names, and end the process with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    logs.configure_driver()
    try:
        sys.exit(run(words) or 0)
    except BadInput as error:
        # Ray re-raises a worker's error as a subclass whose text is the whole traceback; the cause is the plain line.
        sys.stderr.write(f"error: {getattr(error, 'cause', error)}\n")
        sys.exit(2)
    except Outage as error:
        sys.stderr.write(f"outage: {getattr(error, 'cause', error)}\n")
        sys.exit(75)
    except OSError as error:
        files = importlib.import_module("distributed_rerank.storage.files")
        if (line := files.disk_problem(error) or _memory_problem(error)) is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)
    except Exception as error:
        if (line := _memory_problem(error)) is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: finished blocks are kept, the same command continues from them\n")
        sys.exit(130)


def _memory_problem(error: Exception) -> str | None:
    """One line where the error, in this process or a worker of Ray, says that memory was refused; else None."""
    is_refused = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not is_refused and not re.search(r"can't allocate memory|Cannot allocate memory|bad_alloc", str(error)):
        return None
    return (
        "there is not enough memory; lower --images-per-batch, --images-per-block or --num-workers, or give the job "
        "more; finished work is kept, and the same command goes on with it"
    )


def run(words: Sequence[str]) -> int | None:
    """Run the job named by the first word with the others; returns its exit code, None for 0."""
    name, *argv = words or ["--help"]
    if name in ("-h", "--help", "--help-all"):
        sys.stdout.write(overview())
        return 0
    if name == "--version":
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return 0
    name = name.replace("_", "-")
    if name not in JOBS:
        close = difflib.get_close_matches(name, JOBS, n=1)
        raise BadInput(
            f"there is no job {name!r}; "
            + (f"perhaps you meant {close[0]}" if close else f"jobs are {', '.join(JOBS)}")
        )
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(short_help(name))
        return 0
    job = parse(name, argv)
    observe(name, job)
    with importlib.import_module("distributed_rerank.jobs.storage").local_job(job) as job:
        inputs = importlib.import_module("distributed_rerank.jobs.inputs").read_inputs(job)
        importlib.import_module("distributed_rerank.jobs.plan").tell(job, inputs)
        return importlib.import_module(f"distributed_rerank.jobs.{name.replace('-', '_')}").main(job, *inputs)


def observe(name: str, job: Any) -> None:
    """Let this process and its workers log and trace as the job asks for."""
    if (config := getattr(job, "observe", None)) is not None:
        folder = None if config.profile is None else str(config.profile.absolute())
        logs.observe(job=name, log_format=config.log_format, profile=folder)


def overview() -> str:
    """One line for each job."""
    lines = [f"  {name:<22}{inspect.getdoc(kind).splitlines()[0]}" for name, kind in JOBS.items()]  # pyright: ignore
    return "\n".join([f"{PROGRAM} JOB --help explains a job:", "", *lines, ""])


def short_help(name: str) -> str:
    """The manual of a job and its first options."""
    by_flag = {option.flag: option for option in options_of(job_type(name))}
    shown = [by_flag[flag] for flag in FIRST_OPTIONS[name].split()]
    lines = [line for option in shown for line in _help_lines(option)]
    n_others = len(by_flag) - len(shown)
    last = [f"{n_others} more option{'s' if n_others > 1 else ''}: {PROGRAM} {name} --help-all"] if n_others > 0 else []
    return "\n".join([inspect.getdoc(JOBS[name]) or "", "", *lines, "", *last, ""])


def parse(name: str, argv: Sequence[str]) -> Any:
    """The job with the settings on its command line.

    Raises BadInput, in one line with a suggestion, for a wrong command line and for a flag that would have no effect.
    """
    is_help = "--help-all" in argv
    argv = ["--help" if word == "--help-all" else word for word in argv]
    said = io.StringIO()
    try:
        with _wide_terminal(is_help), contextlib.redirect_stderr(said):
            job = tyro.cli(job_type(name, argv), prog=f"{PROGRAM} {name}", args=argv, config=_TYRO)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise BadInput(_of_another_model(name, argv) or _one_line(said.getvalue())) from stop
    check_effect(job, argv)
    return job


def job_type(name: str, argv: Sequence[str] = ()) -> type:
    """The class of the job, with defaults of its own: those of the pairwise model that `argv` names, for `train`."""
    if name == "demo":
        defaults: dict[str, Any] = {"out": Path("out/demo")}
    elif name == "train-extractor":
        defaults = {"training": EXTRACTOR_DEFAULTS}
    elif name == "train":
        model = pairwise_model_of(argv)
        defaults = {"pairwise": pairwise_config(model)(), "training": defaults_for(model)}
    else:
        return JOBS[name]
    hints = typing.get_type_hints(JOBS[name], include_extras=True)
    if "pairwise" in defaults:
        hints["pairwise"] = tyro.conf.OmitArgPrefixes[type(defaults["pairwise"])]
    changed = [(key, hints[key], dataclasses.field(default=value)) for key, value in defaults.items()]
    kind = dataclasses.make_dataclass(JOBS[name].__name__, changed, bases=(JOBS[name],), frozen=True, kw_only=True)
    kind.__doc__ = JOBS[name].__doc__
    return kind


def pairwise_model_of(argv: Sequence[str]) -> str:
    """The pairwise model that a command line names; the default where it names none, or one that there is not."""
    model = "token"
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        if flag.partition("=")[0] in ("--pairwise-model", "--pairwise_model"):
            model = flag.partition("=")[2] or value
    return model if model in PAIRWISE_CONFIGS or is_own(model) else "token"


def check_effect(job: Any, argv: Sequence[str]) -> None:
    """Raises BadInput for a flag on the command line that the other settings make meaningless."""
    given = {flag.replace("_", "-").partition(".")[0] for flag in flags_in(argv)}
    for config in configs_in(job):
        for field, fix in config.without_effect().items() if hasattr(config, "without_effect") else ():
            flag = field.replace("_", "-")
            if flag in given:
                raise BadInput(f"--{flag} has no effect with these settings; leave it out, or add {fix}")


def _of_another_model(name: str, argv: Sequence[str]) -> str | None:
    """The message for a flag that another pairwise model has and the chosen one has not."""
    if name != "train":
        return None
    chosen, own = pairwise_model_of(argv), {option.flag for option in options_of(job_type(name, argv))}
    for flag in (word.replace("_", "-") for word in flags_in(argv)):
        models = [key for key, kind in PAIRWISE_CONFIGS.items() if flag in {option.flag for option in options_of(kind)}]
        if flag not in own and models:
            return f"--{flag} is an option of --pairwise-model {' or '.join(models)}; {chosen} has none, leave it out"
    return None


def _help_lines(option: Option) -> list[str]:
    head = f"  --{option.flag} {option.values}".rstrip()
    text = option.text
    if option.default is MISSING:
        text += " (required)"
    elif option.default not in (None, (), False, True) and not is_dataclass(option.default):
        text += f" (default: {option.default})"
    return [head, *textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")]


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
    text = _without_none(re.sub(r"^Error parsing ([\w.]+: )?", "", message[0]).rstrip("."))
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


def _without_none(text: str) -> str:
    """Of the choices of an optional flag, which tyro lists as a set, those that a user may give, by letter."""

    def listed(found: re.Match[str]) -> str:
        choices = re.findall(r"'([^']*)'", found[0])
        return found[0] if "None" not in choices else f"({', '.join(map(repr, sorted(set(choices) - {'None'})))})"

    return re.sub(r"(?<=Expected one of )\(.*\)", listed, text)


def _misspelt(required: Sequence[str], sections: Sequence[Sequence[str]]) -> str | None:
    """An unknown flag that looks like a required one: a typo is mended before anything else is asked for."""
    unknown = [line for section in sections if section[0].startswith("Unrecognized") for line in section[1:]]
    names = [option.split()[0].removeprefix("--") for option in required]
    for flag in (line.partition("=")[0] for line in unknown if line.startswith("--")):
        if close := difflib.get_close_matches(flag.removeprefix("--"), names, n=1):
            return f"Unrecognized options: {flag}; perhaps you meant --{close[0]}"
    return None
