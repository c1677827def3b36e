"""The notebook runs top to bottom, offline, through the public API."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "lung_cancer_image_classification.ipynb"


def test_no_output_is_stored():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    for key, value in {
        "ZOO_NOTEBOOK_EPOCHS": "2",
        "ZOO_NOTEBOOK_PATIENTS": "30",
        "ZOO_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(NOTEBOOK.parent),
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws inline
    copied = tmp_path / NOTEBOOK.name
    shutil.copy(NOTEBOOK, copied)
    notebook = nbformat.read(copied, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 12
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    data = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert sum("image/png" in each for each in data) >= 6
    tables = [each["text/html"] for each in data if "text/html" in each]
    assert any(html.count("<tr") >= 4 and "test_top1" in html for html in tables)
    (tmp_path / "done.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
