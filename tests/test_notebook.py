"""The notebook runs top to bottom, offline, and shows what it promises; no output of it is stored."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import zoo

NOTEBOOK = Path(__file__).parent.parent / "lung_cancer_image_classification.ipynb"
# Imported by the notebook only to show what training does with an image.
SHOWN = {"zoo.data.decode": {"decode", "resize"}, "zoo.data.transforms": {"make_augment"}}
FIGURES = {"look", "preprocess", "curves", "scores-figure", "confusion", "samples"}


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_stores_no_output(notebook):
    nbformat.validate(notebook)
    assert set(code_cells(notebook)) > FIGURES
    for cell in code_cells(notebook).values():
        assert (cell.outputs, cell.execution_count) == ([], None), cell.id


def test_it_uses_the_public_names_only(notebook):
    tree = ast.parse("\n".join(cell.source for cell in code_cells(notebook).values()))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "zoo"
    }
    assert len(used) > 10
    assert used <= set(zoo.__all__)
    imported = {
        node.module: {name.name for name in node.names}
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "zoo"
    }
    assert imported == SHOWN


@pytest.mark.slow
def test_it_runs_top_to_bottom(notebook, tmp_path, monkeypatch):
    settings = {
        "ZOO_NOTEBOOK_EPOCHS": "1",
        "ZOO_NOTEBOOK_PATIENTS": "24",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(NOTEBOOK.parent),
        "IPYTHONDIR": str(tmp_path / "ipython"),  # no start-up file of this machine's user
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # Without ZOO_HOME the notebook works in its own folder; the inline backend shows figures, Agg would not.
    for name in ("ZOO_HOME", "ZOO_WEIGHTS", "ZOO_PLUGINS", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)

    run = copy.deepcopy(notebook)
    NotebookClient(run, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()

    cells = code_cells(run)
    assert all(cell.execution_count for cell in cells.values())
    outputs = {name: cell.outputs for name, cell in cells.items()}
    assert not [each for out in outputs.values() for each in out if each.output_type == "error"]
    assert not [each.text for out in outputs.values() for each in out if each.get("name") == "stderr"]
    for name in FIGURES:
        assert any("image/png" in each.get("data", {}) for each in outputs[name]), name
    (table,) = (each.data["text/html"] for each in outputs["scores"])
    for row in (
        "majority class",
        "notebook_cnn",
        "test_resnet",
        "test_resnet-scratch",
        "mobilenetv3_small_050",
        "test_resnet-lp",
    ):
        assert f">{row}</td>" in table
    assert (tmp_path / "data" / "phantom-notebook" / "manifest.csv").is_file()
    assert len(list((tmp_path / "models" / "runs").glob("*/run.json"))) == 6
