"""notebooks/: the tour runs on any run of the phantom, and is committed with its outputs."""

import json
import re
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[1] / "notebooks" / "tour.ipynb"
RUN = 'RUN = ROOT / "weights" / "phantom"'


def cells_of_code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_tour_is_committed_with_outputs_of_one_execution():
    cells = cells_of_code(json.loads(TOUR.read_text(encoding="utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert {output.get("name") for output in outputs} <= {"stdout", None}  # no warnings
    pictures = [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]
    assert pictures.count("image/gif") == 1 and pictures.count("image/png") >= 8
    assert TOUR.stat().st_size < 2e6


def test_the_tour_names_its_run_once_and_no_machine():
    text = TOUR.read_text(encoding="utf-8")
    sources = "".join(line for cell in cells_of_code(json.loads(text)) for line in cell["source"])
    assert sources.count(RUN) == 1 and sources.count("weights/") == 0
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


@pytest.mark.slow
def test_the_tour_runs(trained, tmp_path, monkeypatch):
    """On a tiny run, whose samples are noise: its asserts on causality and on the planted copy hold all the same."""
    pytest.importorskip("ipykernel", reason="requirements-notebook.txt is not installed")
    nbclient = pytest.importorskip("nbclient", reason="requirements-notebook.txt is not installed")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PROSTATEVQ_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(TOUR, 4)
    for cell in cells_of_code(notebook):
        cell["source"] = cell["source"].replace(RUN, f"RUN = Path({str(trained.run)!r})")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    outputs = [output for cell in cells_of_code(notebook) for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert "and none of the others" in "".join(output.get("text", "") for output in outputs)
