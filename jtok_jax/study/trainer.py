# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""One run of a study: train.py as a process of its own, in a workdir of its own."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
from tqdm import tqdm

import jtok_jax
from jtok_jax.config import Config
from jtok_jax.data.loader import open_source
from jtok_jax.errors import ConfigError, JtokError, NonFiniteError, Preempted, WorkdirError
from jtok_jax.study.results import measured
from jtok_jax.study.spec import Cell

CACHE = "JAX_COMPILATION_CACHE_DIR"  # seeds share a program
_ERROR = re.compile(r"[\w.]*(Error|Preempted|Interrupted)\b")  # begins the last words of a run
_DEVICES = re.compile(r"^(\d+ x .+), mesh: ", re.MULTILINE)  # in what train.py prints


class StudyError(JtokError):
    """Some runs of a study failed."""


class Places(NamedTuple):
    """Where a study finds and leaves things."""

    root: pathlib.Path  # the repository: train.py and configs/
    runs: pathlib.Path  # a workdir for every run
    results: pathlib.Path  # the table
    data: str = ""  # prepared corpus; empty: data.path of the study


class Fingerprints:
    """Of the data of a run, shortened; each corpus is looked at once."""

    def __init__(self):
        self._known: dict[tuple, str] = {}

    def of(self, config: Config) -> str:
        key = config.data, config.train.seq_len, config.model.vocab_size
        if key not in self._known:
            if config.data.source == "prepared" and not config.data.path:
                raise ConfigError(
                    "The study names no data: pass --data=FOLDER, a corpus that python -m "
                    "jtok_jax.prepare made."
                )
            # Synthetic tokens depend on the seed, of which a study has several.
            first = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))
            text = json.dumps(open_source(first).fingerprint, sort_keys=True)
            self._known[key] = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._known[key]


class Stop:
    """Context in which SIGTERM and Ctrl-C are passed on to the run under way, which saves and ends.

    They are passed on once: a second one would kill a run that is saving, as a second Ctrl-C in a
    terminal does, which reaches the run itself.
    """

    def __init__(self):
        self.asked, self._process = False, None

    def __enter__(self):
        numbers = signal.SIGTERM, signal.SIGINT
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, process: subprocess.Popen, each_second: Callable[[], None]) -> int:
        """Exit code of `process`."""
        self._process = process
        if self.asked:  # while it was started
            process.terminate()
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                each_second()

    def _note(self, number: int, frame) -> None:
        if not self.asked and self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
        self.asked = True


def require_folder(path: pathlib.Path) -> None:
    """Raises ConfigError: runs cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("it may not be written to")
    except OSError as error:
        raise ConfigError(f"--runs={path} cannot be used: {error}") from error


def workdir_of(cell: Cell, places: Places) -> pathlib.Path:
    return places.runs / cell.key


def command(cell: Cell, places: Places) -> list[str]:
    """The run as a command, from the repository's folder."""
    fields = dict(cell.fields) | ({"data.path": places.data} if places.data else {})
    overrides = [f"--config.{key}={value}" for key, value in fields.items()]
    where = f"--config={cell.candidate.arm.config}", f"--workdir={workdir_of(cell, places)}"
    return [sys.executable, "train.py", *where, *overrides]


def train_cell(cell: Cell, config: Config, places: Places, bar: tqdm, stop: Stop, *, data: str):
    """(result, curve) of a run; goes on where a run of this cell was stopped.

    Raises:
        StudyError: it failed; the message has its last words.
        WorkdirError: an earlier run of this cell is still under way.
        Preempted: asked to stop before it was finished.
    """
    workdir = workdir_of(cell, places)
    workdir.mkdir(parents=True, exist_ok=True)
    console, metrics = workdir / "console.txt", workdir / "metrics.jsonl"
    commits = _versions(workdir / "commits.txt", commit(places.root))
    versions = _versions(workdir / "jax.txt", jax.__version__)
    with console.open("a") as output:
        output.write(shlex.join(command(cell, places)) + "\n")
        output.flush()
        process = subprocess.Popen(
            command(cell, places), cwd=places.root, stdout=output, stderr=subprocess.STDOUT,
            env={CACHE: str(places.runs.resolve() / "compiled")} | os.environ,
        )  # fmt: skip
        code = stop.wait(process, lambda: _show(bar, metrics))
    begun = shlex.join(command(cell, places)) + "\n"
    last = _last_words(console.read_text().rpartition(begun)[2])
    if code == Preempted.exit_code or (code and stop.asked):
        raise Preempted(f"Stopped in {cell.name}: {last}")
    if code == WorkdirError.exit_code:
        raise WorkdirError(
            f"{cell.name}: {last} Another study is training it, or what is left of one that was "
            "killed: wait, or stop it."
        )
    bar.update(cell.steps - getattr(bar, "shown", 0))  # a failed run is done with, too
    bar.shown = 0
    if code not in (0, NonFiniteError.exit_code):
        raise StudyError(f"exit code {code}, see {console}: {last}")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    device = _DEVICES.findall(console.read_text())[-1]  # this process leaves devices alone
    about = {"device": device, "data": data, "commit": commits, "jax": versions}
    return measured(cell, config, records, **about, diverged=code != 0)


def _last_words(console: str) -> str:
    """The error that a run ended with, all its lines; else its last one."""
    lines = console.rstrip().splitlines()
    begins = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    return " ".join(line.strip() for line in lines[(begins or [-1])[-1] :])[:1000]


def _versions(path: pathlib.Path, now: str) -> str:
    """What trains a run now, with that of earlier processes: before it starts."""
    known = path.read_text().split() if path.exists() else []
    if now not in known:
        known.append(now)
        path.write_text(" ".join(known) + "\n")
    return " ".join(known)


def _show(bar: tqdm, metrics: pathlib.Path) -> None:
    """Move the bar to the steps a run has written down."""
    with contextlib.suppress(OSError):
        done = max(metrics.read_bytes().count(b"\n") - 1, 0)  # the first is of step 0
        shown = getattr(bar, "shown", 0)
        bar.update(max(done - shown, 0))
        bar.shown = max(done, shown)


def commit(root: pathlib.Path) -> str:
    """Of the code: the commit, "+" where files differ from it, or the version."""
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "jtok_jax", "kernels", "train.py", "configs")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return jtok_jax.__version__
