"""The example notebooks run, from the first cell to the last, and find what was planted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


def test_why_does_the_reward_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    monkeypatch.setenv("NOTEBOOK_RUN", str(tmp_path / "run"))
    notebook = nbformat.read(NOTEBOOKS / "why_does_the_reward_fall.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "application/vnd.jupyter.widget-view+json" in outputs, "the viewer is shown"
    assert "answers are cut from step 5 on" in outputs


def test_notebooks_are_committed_without_outputs() -> None:
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path.name
