"""How many functions a pair passes from the job to the model: few enough that a reader can follow them."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from job_files import EXTRACTOR, SMALL_BLOCKS
from torch import Tensor

import distributed_rerank
from distributed_rerank.chain.chain import Chain, PairwiseStep
from distributed_rerank.jobs import evaluate
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model

PACKAGE = os.path.dirname(distributed_rerank.__file__) + os.sep
MOST_FUNCTIONS, MOST_VALUES = 12, 2
Hop = tuple[str, bool]
"""A function of the package, and whether its caller does not know it by name: it came as a value."""
SEPARATOR = "\t"


def make_recorder(package: str) -> Callable[[FrameType | None], list[Hop]]:
    """A function that gives the hops up to a frame, outermost first. It travels to workers by value, as its maker's."""

    def hops_to(frame: FrameType | None) -> list[Hop]:
        frames = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(package):
                frames.append(frame)
            frame = frame.f_back
        found = []
        for own, caller in zip(frames, [*frames[1:], None], strict=True):
            name = own.f_code.co_name
            is_known = caller is None or name in caller.f_code.co_names
            # The worker's object is called by a method's name, which is no function that travels.
            is_known = is_known or any(isinstance(value, str) and value == name for value in caller.f_locals.values())
            path = own.f_code.co_filename.removeprefix(package)
            found.append((f"{path}:{own.f_code.co_qualname}", not is_known))
        return found[::-1]

    return hops_to


def recording(model: PairwiseModel, file: Path) -> PairwiseModel:
    """The same model; its `forward` writes the hops of its process into the file."""
    hops_to = make_recorder(PACKAGE)

    class Recording(ConcatSiamese):
        def forward(self, *arguments: Tensor) -> Tensor:
            lines = [f"{name}{SEPARATOR}{int(is_value)}" for name, is_value in hops_to(sys._getframe(1))]
            file.write_text("\n".join(lines))
            return super().forward(*arguments)

    same = Recording(model.config)
    same.load_state_dict(model.state_dict())
    return same


def read_hops(file: Path) -> list[Hop]:
    rows = [line.split(SEPARATOR) for line in file.read_text().splitlines()]
    return [(name, bool(int(is_value))) for name, is_value in rows]


def profile_of_submitted_calls(hops: list[Hop]) -> Callable[[FrameType, str, Any], None]:
    """A profile function that keeps the hops to the first call of a worker's `score` that Ray is given."""
    hops_to = make_recorder(PACKAGE)

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        is_submission = frame.f_code.co_name == "_remote" and frame.f_code.co_filename.endswith("ray/actor.py")
        if event == "call" and is_submission and not hops and "score" in (frame.f_locals.get("args") or ())[1:3]:
            hops.extend(hops_to(frame))

    return profile


@pytest.mark.ray
@pytest.mark.parametrize("blocks_per_call", [1, 3])
@pytest.mark.parametrize("on_ray", [False, True])
def test_pair_passes_few_functions_and_few_of_them_as_values(
    catalogue_path: Path,
    models: dict[str, Path],
    run_job: Callable,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    on_ray: bool,
    blocks_per_call: int,
) -> None:
    """On a CPU a call has one score block, on a GPU several."""
    if on_ray:
        request.getfixturevalue("ray_cluster")
    model = recording(load_model(models["concat"]), tmp_path / "hops")
    chain = Chain((PairwiseStep(top_n=5),))
    monkeypatch.setattr(evaluate, "load_model_and_chain", lambda config: (model, chain))
    on_driver: list[Hop] = []
    sys.setprofile(profile_of_submitted_calls(on_driver))
    try:
        outcome = run_job(
            "evaluate", "--catalogue", catalogue_path, "--out", tmp_path / "out", "--model", models["concat"],
            *EXTRACTOR, *SMALL_BLOCKS, "--blocks-per-call", blocks_per_call, "--no-baselines",
            *(["--num-workers", 1] if on_ray else []), on_ray=on_ray,
        )  # fmt: skip
    finally:
        sys.setprofile(None)
    assert outcome.code == 0, outcome.errors
    hops = [*on_driver, *read_hops(tmp_path / "hops")]
    names = [name for name, _ in hops]
    hops = hops[names.index("jobs/evaluate.py:main") :]
    text = "\n".join(f"{'value ' if is_value else '      '}{name}" for name, is_value in hops)
    assert on_ray == any(name.startswith("cluster/") for name, _ in hops), text
    assert any(name.endswith("Scorer.score") for name, _ in hops), text
    assert len(hops) <= MOST_FUNCTIONS, text
    assert sum(is_value for _, is_value in hops) <= MOST_VALUES, text
