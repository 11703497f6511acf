"""What the parts of gpu.py share: rows as they come, rates, the busy share, and the forms a model runs in.

Nothing here imports the project, so that a part which cannot import something loses only itself.
"""

import importlib
import json
import logging
import math
import resource
import shutil
import statistics
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

GB = 1e9
SIDES = {"cpu": (256, 512), "cuda": (8192,)}
"""Square matrices whose product is timed for the peak."""

Wanted = tuple[Literal["at least", "at most"], float]


@dataclass(frozen=True)
class Row:
    """One figure of one part, and what was wanted of it."""

    part: str
    name: str
    unit: str
    value: float | str
    wanted: Wanted | None = None
    verdict: Literal["pass", "short", ""] = ""

    def line(self) -> str:
        """The row as text."""
        value = self.value if isinstance(self.value, str) else number(self.value)
        wanted = f"   wanted {self.wanted[0]} {number(self.wanted[1])} {self.verdict}" if self.wanted else ""
        return f"{self.part:<12} {self.name}: {value} {self.unit}{wanted}".rstrip()


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass
class Context:
    """What a part may use, and where its figures go."""

    part: str
    device: torch.device
    is_quick: bool
    work: Path
    """A folder that all parts share."""
    rows_file: Path
    failures: list[str] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        """Of one measurement."""
        return 0.05 if self.is_quick else 0.9

    def row(self, name: str, unit: str, value: float | str, wanted: Wanted | None = None) -> None:
        """Print the figure and write it at once; a verdict is given on a GPU at full size only."""
        verdict: Literal["pass", "short", ""] = ""
        if wanted is not None and self.is_gpu and not self.is_quick and not isinstance(value, str):
            is_met = value >= wanted[1] if wanted[0] == "at least" else value <= wanted[1]
            verdict = "pass" if is_met else "short"
        row = Row(self.part, name, unit, value, wanted, verdict)
        with self.rows_file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(row.line(), flush=True)

    def attempt(self, name: str) -> "Attempt":
        """A piece of the part that loses only itself: the part goes on, and fails at its end."""
        return Attempt(self, name)

    def check(self, name: str, error: float, bound: float) -> None:
        """State an error; the part fails where it exceeds the bound (NaN does)."""
        self.row(name, f"(bound {number(bound)})", error)
        if not error <= bound:
            self.failures.append(f"{name}: {error} exceeds {bound}")

    def memory(self) -> None:
        """The most memory that this process held, on the device and off it."""
        self.row("peak memory of the process", "GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB)
        if self.is_gpu:
            self.row("peak GPU memory, allocated by torch", "GB", torch.cuda.max_memory_allocated() / GB)
            self.row("peak GPU memory, reserved by torch", "GB", torch.cuda.max_memory_reserved() / GB)


class Attempt:
    """Keeps the traceback of an error in its block, instead of ending the part."""

    def __init__(self, context: Context, name: str) -> None:
        self._context = context
        self._name = name

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        text = "".join(traceback.format_exception(kind, error, trace))
        self._context.failures.append(f"{self._name}\n{text}")
        first_line = (str(error).strip().splitlines() or [""])[0]
        self._context.row(self._name, "", f"FAILED: {type(error).__name__}: {first_line}")
        logging.error("%s failed\n%s", self._name, text)
        if self._context.is_gpu:
            torch.cuda.empty_cache()
        return True


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(work: Callable[[], int], context: Context, rounds: int = 3, seconds: float | None = None) -> float:
    """Units per second of `work`, which does some and returns how many.

    The median of `rounds` that take about `seconds` together, after a warm-up; at least one call in each.
    """
    work()
    synchronise(context.device)
    started = time.perf_counter()
    work()
    synchronise(context.device)
    once = time.perf_counter() - started
    calls = max(1, int((seconds or context.seconds) / rounds / max(once, 1e-6)))
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        done = sum(work() for _ in range(calls))
        synchronise(context.device)
        rates.append(done / (time.perf_counter() - started))
    return statistics.median(rates)


def matmul_peak(dtype: torch.dtype, context: Context) -> float:
    """Floating-point operations per second of the fastest square matrix product of random numbers."""
    best = 0.0
    for side in SIDES[context.device.type]:
        a, b = (torch.randn(side, side, device=context.device).to(dtype) for _ in range(2))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, side: int = side) -> int:
            for _ in range(8):
                torch.mm(a, b)
            return 16 * side**3

        best = max(best, rate(multiply, context))
    return best


def captured(forward: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`forward` as a CUDA graph for inputs of these shapes: they are copied in, one launch runs all kernels."""
    fixed = [tensor.clone() for tensor in inputs]
    # Warmed up on a stream of its own, as capturing demands: the first calls allocate and choose kernels.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward(*fixed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(*fixed)

    def replay(*given: torch.Tensor) -> torch.Tensor:
        for place, tensor in zip(fixed, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return output

    return replay


def forms_of(model: Callable[..., torch.Tensor], is_gpu: bool) -> dict[str, Callable[[Sequence[torch.Tensor]], Any]]:
    """How the model can run with static shapes: each makes the callable from an example of its inputs.

    On a CPU the model is traced and runs without the compiler's own code, which takes no layers packed for oneDNN.
    """
    if not is_gpu:
        return {"torch.compile, traced alone": lambda inputs: torch.compile(model, dynamic=False, backend="aot_eager")}
    return {
        "CUDA graph": lambda inputs: captured(model, inputs),
        "torch.compile": lambda inputs: torch.compile(model, dynamic=False),
        "torch.compile and CUDA graph": lambda inputs: captured(torch.compile(model, dynamic=False), inputs),
    }


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over the deviation of the reference, in float64."""
    found, reference = found.detach().double().cpu(), reference.detach().double().cpu()
    return float((found - reference).square().mean().sqrt() / reference.std(correction=0))


class Busy:
    """Samples, while its block runs, how busy the GPU and the processor are and how much GPU memory is taken.

    The GPU's share is NVML's: time in which any kernel ran. Other processes, such as Ray's workers, count.
    """

    def __init__(self, context: Context, every_s: float = 0.1) -> None:
        self._context = context
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._read = gpu_reader() if context.is_gpu else None
        self._samples: list[tuple[float, float]] = []
        self._memory_gb = 0.0
        self._processor = float("nan")

    def __enter__(self) -> "Busy":
        self._before = processor_times()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        busy, everything = (now - then for now, then in zip(processor_times(), self._before, strict=True))
        self._processor = busy / max(everything, 1)

    def report(
        self, name: str, wanted: Wanted | None = None, *, since: float = -math.inf, until: float = math.inf
    ) -> None:
        """The rows of what was seen; of the GPU's share only that between two values of time.perf_counter."""
        self._context.row(f"{name}: processor busy", "%", 100 * self._processor)
        if self._read is None:
            self._context.row(f"{name}: GPU busy", "", "not measured: no NVIDIA GPU")
            return
        shares = [share for at, share in self._samples if since <= at <= until]
        mean = statistics.mean(shares) if shares else math.nan
        self._context.row(f"{name}: GPU busy, {len(shares)} samples", "%", mean, wanted)
        self._context.row(f"{name}: peak GPU memory of all processes", "GB", self._memory_gb)

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            if self._read is not None:
                share, used = self._read()
                self._samples.append((time.perf_counter(), share))
                self._memory_gb = max(self._memory_gb, used / GB)


def gpu_reader() -> Callable[[], tuple[float, float]]:
    """A function that reads the first GPU's busy share in percent and its bytes in use, by what is there."""
    nvml = _nvml()
    if nvml is not None:
        return nvml
    if shutil.which("nvidia-smi"):
        return _from_nvidia_smi
    return lambda: (float(torch.cuda.utilization()), float(torch.cuda.memory_reserved()))


def _nvml() -> Callable[[], tuple[float, float]] | None:
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetUtilizationRates(handle)
    except pynvml.NVMLError as error:
        logging.warning("NVML does not answer: %s", error)
        return None
    return lambda: (
        float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
    )


def _from_nvidia_smi() -> tuple[float, float]:
    command = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "--id=0"]
    share, used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(",")
    return float(share), float(used) * 2**20


def processor_times() -> tuple[float, float]:
    """Busy and all ticks of all cores since the machine started."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return float(sum(ticks) - idle), float(sum(ticks))


def top_kernels(profile: Any, is_gpu: bool, count: int = 10) -> tuple[list[tuple[str, float, float]], float]:
    """The (name, share, calls) of the kernels that took the most time, and the seconds of all of them."""
    wanted = torch.autograd.DeviceType.CUDA if is_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == wanted]
    times = [(e.key, float(e.self_device_time_total if is_gpu else e.self_cpu_time_total), e.count) for e in events]
    total = sum(spent for _, spent, _ in times) or 1.0
    times.sort(key=lambda entry: -entry[1])
    return [(name, spent / total, calls) for name, spent, calls in times[:count]], total / 1e6
