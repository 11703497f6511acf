"""What Ray's own processes say on the user's terminal. Layer 4."""

import logging

TALKATIVE = {
    # Warns once a second where there is no dashboard; the clean-up that it watches for is done by Ray all the same.
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    # Repeats every figure that the training logs itself.
    "ray.train": logging.WARNING,
    "ray.data": logging.WARNING,
}


def quieten() -> None:
    """Raise the level of Ray's talkative loggers in this process."""
    for name, level in TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
