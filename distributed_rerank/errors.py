"""The errors that are not ours to mend: the user's input, numbers out of range, and a service that does not answer.

Every layer may raise them; the jobs turn each into one line and an exit code of its own.
"""

import math
from typing import Any


class BadInput(ValueError):
    """The user's input is wrong. The message is one line that names the value and the fix. Exit code 2."""


class TakenFolder(BadInput):
    """Another result is where this run would write. A job without --overwrite or --out has another `remedy`.

    Like each error here it can be made anew from its text alone.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem

    def __str__(self) -> str:
        return "; ".join(filter(None, self.args))


class Outage(Exception):
    """A service that the job needs does not answer. The same command may work later. Exit code 75."""


def check_numbers(
    config: Any, names: str, *, least: int | None = None, above: int | None = None, most: int | None = None
) -> None:
    """Raise BadInput for the first of these fields with a number below `least`, not above `above`, or beyond `most`.

    `names` are divided by spaces. Each number of a tuple counts; None is no number. NaN and infinite are refused.
    """
    for name in names.split():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple | list) else [] if value is None else [value]:
            is_low = (least is not None and number < least) or (above is not None and number <= above)
            if is_low or (most is not None and number > most) or not math.isfinite(number):
                low = f"above {above} and " if above is not None else "" if least is None else f"at least {least} and "
                raise BadInput(f"{name}={value} must be {low}{'finite' if most is None else f'at most {most}'}")
