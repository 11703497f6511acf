"""The errors that are not ours to mend: the user's input, and a service that does not answer.

Every layer may raise them; the jobs turn each into one line and an exit code of its own.
"""


class BadInput(ValueError):
    """The user's input is wrong. The message is one line that names the value and the fix. Exit code 2."""


class Outage(Exception):
    """A service that the job needs does not answer. The same command may work later. Exit code 75."""
