"""One format for all log lines."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING|ERROR)( .*)?")


def lines_of(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_every_line_of_a_message_and_of_a_traceback_has_time_and_level() -> None:
    lines = lines_of(
        "import logging\nfrom distributed_rerank.runtime import logs\nlogs.configure_driver()\n"
        "log = logging.getLogger('distributed_rerank.x')\nlog.info('a table\\n 1 2\\n\\n 3 4')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    log.exception('it failed')\n"
    )
    assert [line.split(" ", 2)[2] if line.count(" ") > 1 else "" for line in lines[:4]] == [
        "a table",
        " 1 2",
        "",
        " 3 4",
    ]
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert any("ZeroDivisionError" in line for line in lines)


def test_driver_shows_our_lines_and_of_other_libraries_only_warnings() -> None:
    lines = lines_of(
        "import logging\nfrom distributed_rerank.runtime import logs\nlogs.configure_driver()\n"
        "for name in ('faiss.loader', 'distributed_rerank.x'):\n"
        "    logging.getLogger(name).info('%s tells', name)\n    logging.getLogger(name).warning('%s warns', name)\n"
    )
    assert [line.split(" ", 1)[1] for line in lines] == [
        "WARNING faiss.loader warns", "INFO distributed_rerank.x tells", "WARNING distributed_rerank.x warns",
    ]  # fmt: skip


def test_worker_lines_come_once_though_another_handler_is_there() -> None:
    lines = lines_of(
        "import logging\nlogging.basicConfig(format='%(message)s')\nfrom distributed_rerank.runtime import logs\n"
        "logs.configure_worker()\nlogs.configure_worker()\nlogging.getLogger('distributed_rerank.x').info('once')\n"
    )
    assert len(lines) == 1
    assert LINE.fullmatch(lines[0])


def test_driver_leaves_a_program_that_logs_in_its_own_way_alone() -> None:
    lines = lines_of(
        "import logging\nlogging.basicConfig(format='mine: %(message)s', level=20)\n"
        "from distributed_rerank.runtime import logs\nlogs.configure_driver()\n"
        "logging.getLogger('distributed_rerank.x').info('here')\n"
        "assert logging.getLogger('distributed_rerank').propagate\n"
    )
    assert lines == ["mine: here"]
