"""Runs the cells of docs/tour.ipynb in order, on a few faces and for one epoch."""

import json
import os
import subprocess
import sys

from tests.runs import ROOT


def test_the_tour_ends_with_the_fairness_table(tmp_path):
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "TOUR_SMALL": "1"}
    environment["TOUR_FOLDER"] = str(tmp_path / "tour")
    command = [sys.executable, "-W", "ignore:FigureCanvasAgg is non-interactive", "-c", "\n\n".join(cells)]
    done = subprocess.run(command, cwd=ROOT / "docs", env=environment, text=True, capture_output=True, timeout=300)
    assert not done.returncode, done.stderr
    assert "| EAF-KD  | SL iresnet_tiny |" in done.stdout
    assert (tmp_path / "tour" / "output" / "evaluation" / "report.html").exists()
