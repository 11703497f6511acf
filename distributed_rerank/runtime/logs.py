"""Log lines of driver and workers in one format: time and level on every line, on standard error."""

import logging

PACKAGE = "distributed_rerank"


class LineFormatter(logging.Formatter):
    """Time and level before every line of a message, tables included."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The lines of the message, a traceback's as well, each with the same prefix."""
        first, *others = super().format(record).split("\n")
        prefix = f"{record.asctime} {record.levelname}"
        return "\n".join([first, *(f"{prefix} {line}".rstrip() for line in others)])


def configure_driver() -> None:
    """Show log lines of this process, unless the program that it belongs to has set up logging itself."""
    if not logging.getLogger().handlers and not logging.getLogger(PACKAGE).handlers:
        _show(logging.getLogger())


def configure_worker() -> None:
    """Show the package's log lines of a Ray worker, whatever Ray has set up there; once per process."""
    package = logging.getLogger(PACKAGE)
    if not package.handlers:
        _show(package)
        package.propagate = False  # Ray's own handlers would show each line again, without time
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train lets the INFO lines of every library through


def _show(logger: logging.Logger) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
