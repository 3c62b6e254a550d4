"""Run notebooks and store their outputs: ``python notebooks/run.py 04_retrieval_heads 05_phase_entropy`` (default: all, about an hour).

Beside each interactive figure it stores a picture, so that the figure is visible without JavaScript; this needs Chromium. It leaves out
what says something about the machine or the moment: live widgets, timestamps, and paths of this repository. The first cell says how long
the notebook takes; the time is that of the processor, so it is right on a busy machine, too.
"""

from __future__ import annotations

import argparse
import base64
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import plotly.io
from nbclient import NotebookClient

HERE = Path(__file__).parent
FIGURE, WIDGET, PICTURE = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json", "image/png"
CLOCK = "import os; print(sum(os.times()[:4]))"  # seconds of the processor, of the kernel and of what it started
TAKES = re.compile(r"\n\n\*Takes [^*]*\*")
WIDTH, HEIGHT = 900, 450  # pixels of a picture, unless the figure says otherwise


NOISE = "Failed to load CPU gemm_4bit_forward"  # a message of bitsandbytes that says nothing about the notebook


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove live widgets, timestamps and noise of libraries."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            kept = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            cell.outputs = [output for output in kept if NOISE not in output.get("text", "")]


def add_pictures(notebook: nbformat.NotebookNode) -> None:
    """Store a picture beside each interactive figure; keep the outputs as they are without Chromium."""
    sys.path.insert(0, str(HERE.parent / "data"))
    import publish

    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "figure.png"
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            if FIGURE in output.get("data", {}):
                # The table holds what the engine needs; the rest of the output, such as its settings, stays aside.
                figure = plotly.io.from_json(plotly.io.json.to_json_plotly({k: output.data[FIGURE][k] for k in ("data", "layout")}))
                publish.draw(figure, picture, figure.layout.width or WIDTH, figure.layout.height or HEIGHT)
                if picture.exists():
                    output.data[PICTURE] = base64.b64encode(picture.read_bytes()).decode()
                    picture.unlink()


def say_time(notebook: nbformat.NotebookNode, seconds: float) -> None:
    """Put the running time at the end of the first cell, in whole minutes, rounded up."""
    minutes = math.ceil(seconds / 60)
    first = notebook.cells[0]
    first.source = f"{TAKES.sub('', first.source)}\n\n*Takes about {minutes} minute{'s' * (minutes > 1)} on one processor core.*"


def run(path: Path) -> None:
    """Run one notebook and store it. If a cell fails, the file stays as it was.

    Raises:
        ValueError: an output names this machine's folders.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CLOCK))
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    say_time(notebook, float(notebook.cells.pop().outputs[0].text))
    clean(notebook)
    text = nbformat.writes(notebook)
    if str(HERE.parent) in text or str(Path.home()) in text:
        raise ValueError(f"{path.name}: an output names a folder of this machine. Print paths relative to the repository.")
    add_pictures(notebook)
    nbformat.write(notebook, path)


def main() -> None:
    """Run the notebooks that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names without .ipynb; default: all")
    parser.add_argument("--pictures", action="store_true", help="only draw the pictures of the stored figures again")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    for path in [HERE / f"{name}.ipynb" for name in args.names] or sorted(HERE.glob("*.ipynb")):
        print(path.name, flush=True)
        if args.pictures:
            notebook = nbformat.read(path, as_version=4)
            add_pictures(notebook)
            nbformat.write(notebook, path)
        else:
            run(path)


if __name__ == "__main__":
    main()
