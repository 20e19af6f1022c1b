# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""How long a step of each arm takes, paired: every round runs one step of every arm."""

import csv
import dataclasses
import pathlib
import time
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jtok_jax.config import Config
from jtok_jax.data.loader import make_batch, open_source
from jtok_jax.errors import ConfigError
from jtok_jax.mesh import make_mesh, put_batch
from jtok_jax.study.results import Table, read_csv
from jtok_jax.study.run import last_candidates
from jtok_jax.study.spec import Study, cells, named_errors, resolve
from jtok_jax.study.trainer import Fingerprints, Places, commit
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import init_state
from jtok_jax.training.step import jit_train_step


class StepTime(NamedTuple):
    """Seconds of a step over those of the baseline's in the same round."""

    candidate: str
    cell: str  # Cell.key of what was timed: its first seed
    ratio: float  # median of rounds
    low: float  # 10th percentile
    high: float  # 90th
    milliseconds: float  # median
    rounds: int
    device: str
    commit: str


def step_times(path: pathlib.Path) -> dict[str, StepTime]:
    """What `time_candidates` wrote, by candidate; empty if it did not run.

    Raises:
        ConfigError: an older version did, or it is damaged.
    """
    if not path.exists():
        return {}
    try:
        times = [StepTime(*line) for line in read_csv(path, StepTime.__annotations__)]
    except ConfigError as error:
        raise ConfigError(f"{error} Or run `study time` again, or delete it.") from error
    return {one.candidate: one for one in times}


def time_candidates(study: Study, places: Places, name: str, *, rounds: int) -> str:
    """Time what the last stage of a study trains; RESULTS/NAME-steps.csv and Markdown.

    All are compiled and held at once; the order of a round rotates.

    Raises:
        ConfigError: a stage before it is not finished, or there are no rounds.
        DataError: the table's runs were made with other data.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; expected at least 1.")
    candidates = last_candidates(study, places)
    stage = dataclasses.replace(study.stages[-1], seeds=study.stages[-1].seeds[:1])
    timed = {cell.candidate.name: cell for cell in cells(study, stage, candidates)}
    table, source = Table(places.results), Fingerprints()
    configs, arms = {}, {}
    for candidate, cell in timed.items():
        configs[candidate] = resolve(cell, places.root, data=places.data)
        table.get(cell, configs[candidate], data=source.of(configs[candidate]))
    for candidate, config in configs.items():
        with named_errors(candidate):
            arms[candidate] = _Timed(config)
    for number in tqdm(range(rounds), unit="round", desc="time"):
        order = list(arms.values())
        for arm in order[number % len(order) :] + order[: number % len(order)]:
            arm.step()
    seconds = {name: np.array(arm.seconds[1:]) for name, arm in arms.items()}
    baseline = candidates[study.baseline][0].name
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    times = []
    for arm, of_arm in seconds.items():
        ratios = of_arm / seconds[baseline]
        middle = float(np.median(ratios)), *map(float, np.percentile(ratios, (10, 90)))
        about = 1000 * float(np.median(of_arm)), len(ratios), device, commit(places.root)
        times.append(StepTime(arm, timed[arm].key, *middle, *about))
    path = places.results / f"{name}-steps.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        text = lambda value: f"{value:.4g}" if isinstance(value, float) else value
        writer.writerows([StepTime._fields, *[[text(value) for value in one] for one in times]])
    return _markdown(times, baseline)


class _Timed:
    """A compiled step, its state and a batch; the first step is not counted."""

    def __init__(self, config: Config):
        mesh, optimizer = make_mesh(config.mesh), make_optimizer(config)
        ids = make_batch(open_source(config).sequences(1))
        self._batch = [put_batch(mesh, array) for array in ids]
        self._state = init_state(config, optimizer, mesh)
        run = jit_train_step(config, optimizer, mesh)
        self._run = run.lower(self._state, *self._batch).compile()
        self.seconds: list[float] = []
        self.step()

    def step(self) -> None:
        began = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._run(self._state, *self._batch))
        self.seconds.append(time.perf_counter() - began)


def _markdown(times: list[StepTime], baseline: str) -> str:
    lines = [
        f"| arm | step over {baseline}'s | 10th to 90th percentile | ms |",
        "|---|---|---|---|",
    ]
    for one in times:
        span = f"{one.low:.3f} to {one.high:.3f}"
        lines.append(f"| {one.candidate} | {one.ratio:.3f} | {span} | {one.milliseconds:.1f} |")
    return "\n".join(lines)
