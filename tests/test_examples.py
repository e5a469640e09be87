"""What users are to copy runs from top to bottom."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(EXAMPLES / "first_run.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # what a reader sees, a reader has made
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


def test_the_cleanrl_example_trains(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("cleanrl_ppo", EXAMPLES / "cleanrl_ppo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    agent = module.main(
        module.Args(total_timesteps=240, num_envs=2, num_steps=60, update_epochs=1, out=tmp_path / "curves")
    )
    assert agent.log_std.item() != -0.5  # it was trained
    assert list((tmp_path / "curves").glob("events.*"))
