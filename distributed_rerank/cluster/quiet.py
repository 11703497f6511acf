"""What Ray's own processes say on the user's terminal. Layer 4."""

import logging
from pathlib import Path

import ray

_TRAIN = Path(ray.__file__).parent / "train" / "v2" / "_internal" / "execution"

TALKATIVE = {
    # Warns once a second where there is no dashboard; the clean-up that it watches for is done by Ray all the same.
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    # Repeats every figure that the training logs itself. Ray names this logger by its file.
    str(_TRAIN / "context.py"): logging.WARNING,
    # Warns that authentication is on, which is what we asked for.
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    "ray.data": logging.WARNING,
    # Warns that there are no progress bars where they were switched off.
    "ray.data._internal.progress": logging.ERROR,
}


def quieten() -> None:
    """Raise the level of Ray's talkative loggers in this process."""
    for name, level in TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
