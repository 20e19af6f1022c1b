# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""benchmarks/gpu.py with commands that need no GPU."""

import importlib.util
import pathlib
import shlex
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def load():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    """The module as loaded, on a machine that says it has a card."""
    module = load()
    monkeypatch.setattr(module, "place", lambda: "a card, jax 1.2.3, commit 0123abc")
    return module


def python(text: str) -> str:
    return f"-c {shlex.quote(text)}"


def run(gpu, monkeypatch, out, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={out}", *flags])
    return gpu.main()


def test_runs_end_in_a_table_whatever_becomes_of_them_and_go_on(gpu, tmp_path, monkeypatch, capsys):
    sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    runs = [
        gpu.Run("slow", python(child), 3),
        gpu.Run("wrong", python("print('reason'); raise SystemExit(7)"), 60),
        gpu.Run("right", python("import os; print(os.environ['JAX_PLATFORMS'])"), 60),
    ]
    monkeypatch.setattr(gpu, "RUNS", runs)
    assert run(gpu, monkeypatch, tmp_path) == 2
    lines = {run.name: (tmp_path / f"{run.name}.txt").read_text().splitlines() for run in runs}
    state = pathlib.Path(
        "/proc", lines["slow"][1], "stat"
    )  # what the command had started ended, too
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert lines["slow"][-1].startswith("exit code stopped after 3 s on a card, jax 1.2.3")
    assert [lines["wrong"][1], lines["wrong"][2][:12]] == ["reason", "exit code 7 "]
    assert lines["right"][1] == "cuda,cpu"
    table = (tmp_path / "README.md").read_text().splitlines()
    assert [row.split("|")[3].strip() for row in table[2:]] == ["stopped", "7", "0"]
    assert capsys.readouterr().out.count("at most") == 3

    runs[1] = gpu.Run("wrong", python("print('mended')"), 60)
    assert run(gpu, monkeypatch, tmp_path, "--only=wrong") == 0
    monkeypatch.setattr(gpu, "RUNS", runs[1:])
    capsys.readouterr()
    assert run(gpu, monkeypatch, tmp_path) == 0
    assert "at most" not in capsys.readouterr().out


def test_without_a_gpu_or_with_an_unknown_name_nothing_starts(tmp_path, monkeypatch, capsys):
    module = load()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit, match=r"no GPU that JAX can use here .*: cpu"):
        run(module, monkeypatch, tmp_path / "new")
    with pytest.raises(SystemExit):
        run(module, monkeypatch, tmp_path / "new", "--only=testing")
    assert "no testing; there are tests, kernels" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_every_file_that_a_run_names_exists_and_limits_fit_half_an_hour(gpu):
    for one in gpu.RUNS:
        words = [word.removeprefix("--config=") for word in one.command.split()]
        files = [word for word in words if word.endswith(".py")]
        assert files
        assert all((ROOT / name).exists() for name in files), one.name
    assert sum(one.limit for one in gpu.RUNS) <= 1800
