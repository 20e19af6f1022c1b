# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""One run of a study: train.py as a process of its own, in a workdir of its own."""

import contextlib
import functools
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
from tqdm import tqdm

import jtok_jax
from jtok_jax.config import Config, TrainConfig
from jtok_jax.data.loader import open_source
from jtok_jax.errors import ConfigError, JtokError, NonFiniteError, Preempted, WorkdirError
from jtok_jax.model_config import ModelConfig
from jtok_jax.study.results import Result, make_result
from jtok_jax.study.spec import Cell, short_hash
from jtok_jax.training.guards import StopSignal

CACHE = "JAX_COMPILATION_CACHE_DIR"  # seeds share a program
DEVICES = "import jax; print(jax.device_count(), 'x', jax.devices()[0].device_kind)"


class StudyError(JtokError):
    """Some runs of a study failed."""


class Paths(NamedTuple):
    """Where a study finds and leaves things."""

    root: pathlib.Path  # the repository: train.py and configs/
    runs: pathlib.Path  # a workdir for every run
    results: pathlib.Path  # the table
    data: str = ""  # prepared corpus; empty: data.path of the study
    ngrams: str = ""  # file of frequent n-grams, for models that read them

    @property
    def inputs(self) -> dict[str, str]:
        """Return what `resolve` is told of data."""
        return {"data": self.data, "ngrams": self.ngrams}


def data_fingerprint(config: Config) -> str:
    """Return a short fingerprint of the data of a run; each corpus is looked at once."""
    if config.data.source == "prepared" and not config.data.path:
        raise ConfigError(
            "The study names no data: pass --data=FOLDER, a corpus that python -m "
            "jtok_jax.prepare made."
        )
    # The default seed: synthetic tokens depend on it, and a study has several.
    train = TrainConfig(batch_size=config.train.batch_size, seq_len=config.train.seq_len)
    model = ModelConfig(vocab_size=config.model.vocab_size)
    return _fingerprint(Config(model=model, train=train, data=config.data))


@functools.cache
def _fingerprint(config: Config) -> str:
    return short_hash(open_source(config).fingerprint)


def workdir_of(cell: Cell, paths: Paths) -> pathlib.Path:
    """Return the workdir of a run."""
    return paths.runs / cell.key


def command(cell: Cell, config: Config, paths: Paths) -> list[str]:
    """Return the run as a command, from the repository's folder."""
    fields = dict(cell.fields) | ({"data.path": paths.data} if paths.data else {})
    fields |= {"data.ngrams": config.data.ngrams} if config.data.ngrams else {}
    overrides = [f"--config.{key}={value}" for key, value in fields.items()]
    where = f"--config={cell.candidate.arm.config}", f"--workdir={workdir_of(cell, paths)}"
    return [sys.executable, "train.py", *where, *overrides]


def train_cell(
    cell: Cell, config: Config, paths: Paths, bar: tqdm, stop: StopSignal, *, data: str
) -> tuple[Result, list[tuple]]:
    """Return result and curve of a run; goes on where a run of this cell was stopped.

    Raises:
        StudyError: it failed; the message has its last words.
        WorkdirError: an earlier run of this cell is still under way.
        Preempted: asked to stop before it was finished.
    """
    workdir, before = workdir_of(cell, paths), bar.n
    workdir.mkdir(parents=True, exist_ok=True)
    console, metrics = workdir / "console.txt", workdir / "metrics.jsonl"
    about = {
        "data": data,
        "commit": _add_version(workdir / "commits.txt", commit(paths.root)),
        "jax": _add_version(workdir / "jax.txt", jax.__version__),
    }
    with console.open("a+") as output:
        output.write(shlex.join(command(cell, config, paths)) + "\n")
        output.flush()
        begun = output.tell()
        process = subprocess.Popen(
            command(cell, config, paths), cwd=paths.root, stdout=output, stderr=subprocess.STDOUT,
            env={CACHE: str(paths.runs.resolve() / "compiled")} | os.environ,
        )  # fmt: skip
        code = wait(process, stop, lambda: _show(bar, before, metrics))
        output.seek(begun)
        printed = output.read()[-1000:].strip()
    if code == Preempted.exit_code or (code and stop.name):
        last_line = printed.rpartition("\n")[2]
        raise Preempted(f"Stopped in {cell.name}: {last_line}")
    if code == WorkdirError.exit_code:
        raise WorkdirError(
            f"{cell.name}: {printed} Another study is training it, or what is left of one that was "
            "killed: wait, or stop it."
        )
    diverged = code == NonFiniteError.exit_code
    if code and not diverged:
        raise StudyError(f"exit code {code}; the end of {console}:\n{printed}")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return make_result(cell, config, records, device=_devices(), diverged=diverged, **about)


def wait(process: subprocess.Popen, stop: StopSignal, between: Callable[[], None]) -> int:
    """Return the exit code of a run, which is asked once to save and end if the study is."""
    asked = False
    while True:
        if stop.name and not asked:
            process.terminate()
            asked = True
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            between()


@functools.cache
def _devices() -> str:
    """Return the devices that runs train on, from a process that leaves them free again."""
    asked = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True)
    if asked.returncode:
        raise StudyError(f"Devices cannot be named: {asked.stderr[-1000:]}")
    return asked.stdout.strip()


def _add_version(path: pathlib.Path, now: str) -> str:
    """Return and write down the versions that have trained a run, `now` included."""
    known = path.read_text().split() if path.exists() else []
    if now not in known:
        known.append(now)
        path.write_text(" ".join(known) + "\n")
    return " ".join(known)


def _show(bar: tqdm, before: int, metrics: pathlib.Path) -> None:
    """Move the bar to the steps that a run has written down."""
    with contextlib.suppress(OSError):
        done = metrics.read_bytes().count(b"\n") - 1  # the first is of step 0
        bar.update(max(before + done - bar.n, 0))


def commit(root: pathlib.Path) -> str:
    """Return the commit of the code, with "+" where files differ from it; else the version."""
    git = lambda *words: subprocess.check_output(
        ["git", *words], cwd=root, stderr=subprocess.DEVNULL, text=True
    ).strip()
    try:
        changed = git("status", "--porcelain", "--", "jtok_jax", "kernels", "train.py", "configs")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return jtok_jax.__version__
