"""The one error a user can cause. Every layer may raise it; the jobs turn it into one line and exit code 2."""


class BadInput(ValueError):
    """The user's input is wrong. The message is one line that names the value and the fix."""
