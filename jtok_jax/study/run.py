# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Runs of a study, one after the other; each is a normal run of train.py in its own workdir."""

import contextlib
import hashlib
import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import jtok_jax
from jtok_jax.config import Config
from jtok_jax.data.loader import open_source
from jtok_jax.errors import ConfigError, JtokError, NonFiniteError, Preempted
from jtok_jax.study.results import Result, Table, measured
from jtok_jax.study.spec import (
    Candidate,
    Cell,
    Stage,
    Study,
    cells,
    expand,
    going_on,
    require_comparable,
    resolve,
    start,
)


class StudyError(JtokError):
    """Some runs of a study failed."""


class Places(NamedTuple):
    """Where a study finds and leaves things."""

    root: pathlib.Path  # the repository: train.py and configs/
    runs: pathlib.Path  # a workdir for every run
    results: pathlib.Path  # the table
    data: str = ""  # prepared corpus; empty: data.path of the study


class Ranked(NamedTuple):
    """A candidate and its results, one a seed."""

    candidate: Candidate
    results: list[Result]

    @property
    def loss(self) -> float:
        return float(np.mean([result.val_loss for result in self.results]))


_DEVICES = re.compile(r"^(\d+ x .+), mesh: ", re.MULTILINE)  # in what train.py prints
StageResults = dict[str, list[Ranked]]  # by arm, best first
Obtain = Callable[[Cell, Config], Result | None]


def run_study(study: Study, places: Places, *, keep_checkpoints: bool) -> list[StageResults]:
    """Run what is not in the table; report what fails and go on.

    Raises:
        ConfigError, DataError: before a stage runs: runs that cannot be compared, or finished
            ones of another configuration or other data.
        StudyError: runs failed.
        Preempted: asked to stop; the run under way is saved.
    """
    table, failures, source = Table(places.results), [], _Fingerprints()
    with tqdm(total=_steps(study), unit="step", desc="study", dynamic_ncols=True) as bar:

        def obtain(cell: Cell, config: Config) -> Result | None:
            found = table.get(cell, config, data=source.of(config))
            if found:
                bar.total -= cell.steps
                return found
            bar.set_postfix_str(cell.name)
            try:
                found, curve = _train(cell, config, places, bar, data=source.of(config))
            except StudyError as error:
                failures.append(f"{cell.name}: {error}")
                tqdm.write(f"FAILED {failures[-1]}", file=sys.stderr)
                return None
            table.add(found, config, curve)
            tqdm.write(f"{found.cell} {found.val_loss:.4f} nats/token: {cell.name}")
            if not keep_checkpoints:
                shutil.rmtree(_workdir(cell, places) / "checkpoints", ignore_errors=True)
            return found

        stages = _walk(study, places, obtain, check=lambda c, n: table.get(c, n, data=source.of(n)))
    if failures:
        raise StudyError(f"{len(failures)} of the study's runs failed, see above.")
    return stages


def finished(study: Study, places: Places) -> list[StageResults]:
    """What the table has of a study. Raises ConfigError where a run is missing."""
    table, missing = Table(places.results), []

    def obtain(cell: Cell, config: Config) -> Result | None:
        found = table.get(cell, config)
        missing.extend([] if found else [cell.name])
        return found

    stages = _walk(study, places, obtain, check=table.get)
    if missing:
        raise ConfigError(
            f"{len(missing)} runs are not in {places.results}: {'; '.join(missing[:3])} ... Run "
            "the study first (python -m jtok_jax.study run)."
        )
    return stages


def _walk(study: Study, places: Places, obtain: Obtain, *, check: Obtain) -> list[StageResults]:
    """All stages; the runs of one are checked before the first is made."""
    candidates, done = start(study), []
    for stage in study.stages:
        of_stage = expand(candidates, stage)
        wanted = cells(study, stage, of_stage)
        configs = [resolve(cell, places.root, data=places.data) for cell in wanted]
        named = {cell.name: config for cell, config in zip(wanted, configs, strict=True)}
        require_comparable(named)
        for cell, config in zip(wanted, configs, strict=True):
            check(cell, config)
        results: dict[str, list[Result]] = {}
        for cell, config in zip(wanted, configs, strict=True):
            found = obtain(cell, config)
            if found:
                results.setdefault(cell.candidate.name, []).append(found)
        done.append(_ranked(of_stage, results))
        candidates = _going_on(candidates, done[-1], stage)
    return done


def _ranked(candidates: dict[str, list[Candidate]], results: dict[str, list[Result]]):
    ranked = {
        name: [Ranked(one, results[one.name]) for one in of_arm if one.name in results]
        for name, of_arm in candidates.items()
    }
    return {name: sorted(some, key=lambda one: one.loss) for name, some in ranked.items()}


def _going_on(candidates, ranked: StageResults, stage: Stage) -> dict[str, list[Candidate]]:
    """The best of every arm; an arm that skipped the stage, or of which all runs failed, as is."""
    if not stage.keep:
        return candidates
    chosen = lambda some: going_on([one.candidate for one in some], stage)
    best = {name: chosen(some) for name, some in ranked.items() if some}
    return candidates | best


def _steps(study: Study) -> int:
    """Training steps of a study, if nothing fails."""
    candidates, total = start(study), 0
    for stage in study.stages:
        of_stage = expand(candidates, stage)
        total += stage.steps * len(cells(study, stage, of_stage))
        if stage.keep:
            candidates |= {name: going_on(some, stage) for name, some in of_stage.items()}
    return total


class _Fingerprints:
    """Of the data of a run, shortened; each corpus is looked at once."""

    def __init__(self):
        self._known: dict[tuple, str] = {}

    def of(self, config: Config) -> str:
        key = config.data, config.train.seq_len, config.model.vocab_size
        if key not in self._known:
            text = json.dumps(open_source(config).fingerprint, sort_keys=True)
            self._known[key] = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._known[key]


def _workdir(cell: Cell, places: Places) -> pathlib.Path:
    return places.runs / cell.key


def command(cell: Cell, places: Places) -> list[str]:
    """The run as a command, from the repository's folder."""
    fields = dict(cell.fields) | ({"data.path": places.data} if places.data else {})
    overrides = [f"--config.{key}={value}" for key, value in fields.items()]
    where = f"--config={cell.candidate.arm.config}", f"--workdir={_workdir(cell, places)}"
    return [sys.executable, "train.py", *where, *overrides]


def _train(cell: Cell, config: Config, places: Places, bar: tqdm, *, data: str):
    """(result, curve) of a run; goes on where a run of this cell was stopped.

    Raises:
        StudyError: it failed; the message has its last words.
    """
    workdir = _workdir(cell, places)
    workdir.mkdir(parents=True, exist_ok=True)
    console, metrics = workdir / "console.txt", workdir / "metrics.jsonl"
    with console.open("a") as output:
        output.write(shlex.join(command(cell, places)) + "\n")
        output.flush()
        process = subprocess.Popen(
            command(cell, places), cwd=places.root, stdout=output, stderr=subprocess.STDOUT
        )
        code = _wait(process, lambda: _show(bar, metrics))
    bar.update(cell.steps - getattr(bar, "shown", 0))
    bar.shown = 0
    if code == Preempted.exit_code:
        raise Preempted(f"{cell.name} is saved. Run the same command to go on.")
    if code not in (0, NonFiniteError.exit_code):
        last = console.read_text().rstrip().rpartition("\n")[2]
        raise StudyError(f"exit code {code}, see {console}: {last[:500]}")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    device = _DEVICES.findall(console.read_text())[-1]  # this process leaves devices alone
    return measured(cell, config, records, device=device, data=data, commit=commit(places.root))


def _show(bar: tqdm, metrics: pathlib.Path) -> None:
    """Move the bar to the steps a run has written down."""
    with contextlib.suppress(OSError):
        done = metrics.read_bytes().count(b"\n")
        shown = getattr(bar, "shown", 0)
        bar.update(max(done - shown, 0))
        bar.shown = max(done, shown)


def _wait(process: subprocess.Popen, each_second: Callable[[], None]) -> int:
    """Exit code of `process`; a request to stop is passed on to it."""
    with _passing_on(process):
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                each_second()


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen) -> Iterator[None]:
    """SIGTERM and Ctrl-C go to `process`, which saves and ends; once, for a second one kills it."""
    asked = []

    def handler(number, frame):
        if asked:
            return
        asked.append(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)

    numbers = signal.SIGTERM, signal.SIGINT
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


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
