# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""How long a step of each arm takes, paired: every round runs one step of every arm."""

import itertools
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
from jtok_jax.study.estimate import markdown_table
from jtok_jax.study.results import Table, read_csv, write_csv
from jtok_jax.study.run import load_progress
from jtok_jax.study.spec import Study, cells, resolve
from jtok_jax.study.trainer import Paths, commit, data_fingerprint
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
    """Return what `time_candidates` wrote, by candidate; empty if it did not run.

    Raises ConfigError: an older version did, or it is damaged.
    """
    try:
        return {one.candidate: one for one in read_csv(path, StepTime)}
    except ConfigError as error:
        raise ConfigError(f"{error} Or run `study time` again, or delete it.") from error


def time_candidates(study: Study, paths: Paths, study_name: str, *, rounds: int) -> str:
    """Time what the last stage of a study trains; RESULTS/STUDY_NAME-steps.csv and Markdown.

    All are compiled and held at once; the order of a round rotates.

    Raises:
        ConfigError: a stage before it is not finished, or there are no rounds.
        DataError: the table's runs were made with other data.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; expected at least 1.")
    progress, table = load_progress(study, paths), Table(paths.results)
    progress.require(study.baseline in progress.candidates, paths)
    timed, configs = {}, {}
    for one in itertools.chain(*progress.candidates.values()):
        cell = timed[one.name] = cells(study, study.stages[-1], [one])[0]
        config = configs[one.name] = resolve(cell, paths.root, **paths.inputs)
        table.get(cell, config, data=data_fingerprint(config))
    steps = {name: _Step(config) for name, config in configs.items()}
    order = list(steps.values())
    for _ in tqdm(range(rounds), unit="round", desc="time"):
        for step in order:
            step.run()
        order.append(order.pop(0))
    seconds = {name: np.array(step.seconds[1:]) for name, step in steps.items()}
    baseline = progress.candidates[study.baseline][0].name
    about = rounds, f"{jax.device_count()} x {jax.devices()[0].device_kind}", commit(paths.root)
    times = []
    for name, of_arm in seconds.items():
        ratios = np.percentile(of_arm / seconds[baseline], (50, 10, 90)).tolist()
        milliseconds = 1000 * float(np.median(of_arm))
        times.append(StepTime(name, timed[name].key, *ratios, milliseconds, *about))
    paths.results.mkdir(parents=True, exist_ok=True)
    write_csv(paths.results / f"{study_name}-steps.csv", StepTime, times, digits=4)
    head = "arm", f"step over {baseline}'s", "10th to 90th percentile", "ms"
    return markdown_table(head, [
        (one.candidate, f"{one.ratio:.3f}", f"{one.low:.3f} to {one.high:.3f}",
         f"{one.milliseconds:.1f}")
        for one in times
    ])  # fmt: skip


class _Step:
    """A compiled step, its state and a batch; the first call is not counted."""

    def __init__(self, config: Config):
        mesh, optimizer = make_mesh(config.mesh), make_optimizer(config)
        ids = make_batch(open_source(config).sequences(1))
        self._batch = [put_batch(mesh, array) for array in ids]
        self._state = init_state(config, optimizer, mesh)
        step = jit_train_step(config, optimizer, mesh)
        self._step = step.lower(self._state, *self._batch).compile()
        self.seconds: list[float] = []
        self.run()

    def run(self) -> None:
        """Run the step once and note its seconds."""
        began = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._step(self._state, *self._batch))
        self.seconds.append(time.perf_counter() - began)
