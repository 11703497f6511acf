"""By what a compiled library is told from one of other sources. Layer 1.

Nothing but the standard library is imported, for `setup.py` runs this file where nothing else is installed.
"""

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """sha256 of the names and the contents of the C++ files in the folder."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.*")):
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        found.update(file.read_bytes())
    return found.hexdigest()
