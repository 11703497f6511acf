"""Loggers of Ray that report what was asked for, on the user's terminal."""

import logging

TALKATIVE = {
    # Warns that authentication is on.
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    "ray.data": logging.WARNING,
    # Warns that there are no progress bars where they were switched off.
    "ray.data._internal.progress": logging.ERROR,
}


def quieten() -> None:
    """Raise the level of Ray's talkative loggers in this process."""
    for name, level in TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
