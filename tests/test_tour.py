# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The notebook, executed on small shapes, and as it is kept."""

import base64
import json
import os
import subprocess
import sys

from conftest import CACHE, ROOT
from pythons import oldest

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def cells(kind: str) -> list[dict]:
    return [one for one in json.loads(NOTEBOOK.read_text())["cells"] if one["cell_type"] == kind]


@oldest
def test_every_cell_runs_and_draws_what_it_says(tmp_path):
    """A stand-in for a few hundred steps on the standard library: four, on this project."""
    code = ["import matplotlib", 'matplotlib.use("Agg")']
    code += ["".join(one["source"]) for one in cells("code")]
    code += [f'[plt.figure(n).savefig(f"{tmp_path}/{{n}}.png") for n in plt.get_fignums()]']
    script = tmp_path / "tour.py"
    script.write_text("\n\n".join(code))
    environment = os.environ | {
        "TOUR_STEPS": "4", "TOUR_RUNS": str(tmp_path), "TOUR_INPUT": f"{ROOT}/jtok_jax/*.py",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "nats over" in done.stdout
    assert all((tmp_path / f"{number}.png").stat().st_size > 5000 for number in (1, 2, 3))


def test_the_notebook_is_kept_with_its_results():
    """No error, three pictures, nothing of the machine that made it."""
    outputs = [output for one in cells("code") for output in one["outputs"]]
    assert not [one for one in outputs if one["output_type"] == "error"]
    pictures = [one["data"]["image/png"] for one in outputs if "image/png" in one.get("data", {})]
    assert len(pictures) == 3
    assert all(base64.b64decode(one).startswith(b"\x89PNG") for one in pictures)
    assert all(one["execution_count"] for one in cells("code"))
    text = NOTEBOOK.read_text()
    assert str(ROOT) not in text
    assert len(text) < 400_000
