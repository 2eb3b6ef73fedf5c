"""Every notebook runs from top to bottom, and is committed without outputs."""

from pathlib import Path

import pytest

import kvsim

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEMO = Path(kvsim.__file__).parent / "data" / "demo.kvtrace"


def test_there_are_notebooks():
    assert [p.name for p in NOTEBOOKS][0] == "01-first-run.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.skipif(not DEMO.exists(), reason="the demo trace is not here yet")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [d for c in notebook.cells if c.cell_type == "code" for o in c.outputs for d in o.get("data", {})]
    assert "image/png" in shown and "text/html" in shown
