"""Execute the notebooks in order and write them with their results: python docs/notebooks/execute.py [FOLDER].

They compute in FOLDER/out (default: beside the notebooks) and go on with what lies there. Needs pip install nbclient
ipykernel.
"""

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).resolve().parent.glob("*.ipynb"))


def execute(folder: Path) -> list[Path]:
    """Each notebook with its results in `folder`. Raises CellExecutionError where a cell fails."""
    done = []
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
        tidy(notebook)
        nbformat.write(notebook, folder / path.name)
        done.append(folder / path.name)
    return done


def tidy(notebook: Any) -> None:
    """Without clocks, tqdm's advice, and a second copy of each picture; what a command wrote bit by bit is one text."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept: list[Any] = []
        for output in cell.get("outputs", []):
            if "image/jpeg" in output.get("data", {}):
                output["data"].pop("image/png", None)
            if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
                kept[-1].text += output.text
            elif "TqdmWarning" not in output.get("text", ""):
                kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept


if __name__ == "__main__":
    execute(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
