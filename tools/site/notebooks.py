"""Runs the notebooks of the documentation, and makes pages of them.

python -m tools.site.notebooks    runs all, with the embedded model, and keeps what they print
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
SECONDS = 120
"""Longest time of a cell."""


def page_of(content: bytes, name: str) -> str:
    """Makes Markdown of a notebook: its text as it is, its code in fences, and what the code printed.

    Args:
        content: The notebook's file.
        name: The file's name, for a link.
    """
    parts = []
    for cell in nbformat.reads(content.decode(), as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            parts += [_shown(output) for output in cell.outputs]
    parts.append(f"[This page as a notebook]({name})")
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return _block(output.text)
    data = output.get("data", {})
    if "image/jpeg" in data:
        return f'<img alt="output" class="output" src="data:image/jpeg;base64,{"".join(data["image/jpeg"].split())}">'
    return _block(data.get("text/plain", ""))


def _block(text: str) -> str:
    return f"```{{ .text .output }}\n{ESCAPES.sub('', text).rstrip()}\n```" if text.strip() else ""


def executed(file: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a kernel of its own, in an empty folder.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook: nbformat.NotebookNode = nbformat.read(file, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of that run
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]  # progress bars
            for output in cell.outputs:
                output.get("data", {}).pop("image/png", None)  # several times as large as its JPEG
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    """Runs every notebook and writes it back."""
    os.environ["PYTHONPATH"] = str(FOLDER.parents[1])  # this checkout's vlmfix, whatever is installed
    for file in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(executed(file), file)
        print(file.name)


if __name__ == "__main__":
    main()
