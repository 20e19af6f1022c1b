# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A study from stage to stage: what is trained, what is in the table already, what goes on."""

import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from jtok_jax.config import Config
from jtok_jax.errors import ConfigError, DataError, Preempted
from jtok_jax.study.results import Result, Table
from jtok_jax.study.spec import (
    Candidate,
    Cell,
    Stage,
    Study,
    cells,
    check_study,
    expand,
    going_on,
    resolve,
    start,
)
from jtok_jax.study.trainer import (
    Fingerprints,
    Places,
    Stop,
    StudyError,
    train_cell,
    workdir_of,
)


class Ranked(NamedTuple):
    """A candidate and its results, one a seed."""

    candidate: Candidate
    results: list[Result]

    @property
    def loss(self) -> float:
        return float(np.mean([result.val_loss for result in self.results]))


StageResults = dict[str, list[Ranked]]  # by arm, best first
Obtain = Callable[[Cell, Config], Result | None]


def run_study(study: Study, places: Places, *, keep_checkpoints: bool) -> list[StageResults]:
    """Run what is not in the table; report what fails and go on.

    Raises:
        ConfigError, DataError: before anything runs: arms that cannot be, or cannot be compared;
            before a stage does: finished runs of another configuration or other data.
        StudyError: runs failed; where a stage chooses, before the next one.
        WorkdirError: a run of an earlier start is still under way.
        Preempted: asked to stop; the run under way is saved.
    """
    table, source = Table(places.results), Fingerprints()
    bar = tqdm(total=_steps(study), unit="step", desc="study", dynamic_ncols=True)
    with bar, Stop() as stop:

        def obtain(cell: Cell, config: Config) -> Result | None:
            found = table.get(cell, config, data=source.of(config))
            if found:
                bar.total -= cell.steps
                return found
            bar.set_postfix_str(cell.name)
            try:
                found, curve = train_cell(cell, config, places, bar, stop, data=source.of(config))
            except StudyError as error:
                tqdm.write(f"FAILED {cell.name}: {error}", file=sys.stderr)
                return None
            table.add(found, config, curve)
            tqdm.write(f"{found.cell} {found.val_loss:.4f} nats/token: {cell.name}")
            if not keep_checkpoints:
                shutil.rmtree(workdir_of(cell, places) / "checkpoints", ignore_errors=True)
            if stop.asked:
                raise Preempted(f"{cell.name} is finished. The same command goes on.")
            return found

        def chosen(missing: list[str]) -> None:
            if missing:
                raise StudyError(
                    f"{len(missing)} runs failed, see above, and what the next stage trains "
                    "depends on them."
                )

        check = lambda cell, config: table.get(cell, config, data=source.of(config))
        walk = _walk(study, study.stages, places, obtain, check=check, chosen=chosen)
    if walk.missing:
        raise StudyError(f"{len(walk.missing)} runs failed, see above.")
    return walk.done


def finished(study: Study, places: Places) -> tuple[list[StageResults], list[str]]:
    """What the table has of a study, and which runs of the last stage it lacks.

    Raises:
        ConfigError: a run is missing that a stage chooses from, or all of the baseline's.
        DataError: its runs are of different texts.
    """
    table = Table(places.results)
    walk = _walk(study, study.stages, places, table.get, check=table.get, chosen=_needed(places))
    if not walk.done[-1][study.baseline]:
        _needed(places)(walk.missing)
    every = [one for stage in walk.done for some in stage.values() for one in some]
    if len(texts := {result.data for one in every for result in one.results}) > 1:
        raise DataError(
            f"{places.results} has runs of this study with the data {', '.join(sorted(texts))}: "
            "losses on different texts cannot be compared. Keep those of one."
        )
    return walk.done, walk.missing


def last_candidates(study: Study, places: Places) -> dict[str, list[Candidate]]:
    """What the last stage trains. Raises ConfigError if a stage before it is not finished."""
    table, stages = Table(places.results), study.stages[:-1]
    walk = _walk(study, stages, places, table.get, check=table.get, chosen=_needed(places))
    return expand(walk.candidates, study.stages[-1])


def _needed(places: Places) -> Callable[[list[str]], None]:
    def end_of_stage(missing: list[str]) -> None:
        if missing:
            raise ConfigError(
                f"{len(missing)} runs are not in {places.results}: {'; '.join(missing[:3])} ... "
                "Run the study first (python -m jtok_jax.study run)."
            )

    return end_of_stage


class _Walk(NamedTuple):
    done: list[StageResults]
    candidates: dict[str, list[Candidate]]  # of the stage after
    missing: list[str]  # runs of the last of these stages


def _walk(
    study: Study,
    stages: tuple[Stage, ...],
    places: Places,
    obtain: Obtain,
    *,
    check: Obtain,
    chosen: Callable[[list[str]], None],
) -> _Walk:
    """`stages` of a study; all are checked before the first run, and the table for each stage.

    chosen: told which runs a stage lacks that chooses, before it does.
    """
    check_study(study, places.root, data=places.data)
    candidates, done, missing = start(study), [], []
    for stage in stages:
        of_stage = expand(candidates, stage)
        wanted = cells(study, stage, of_stage)
        configs = [resolve(cell, places.root, data=places.data) for cell in wanted]
        for cell, config in zip(wanted, configs, strict=True):
            check(cell, config)
        results: dict[str, list[Result]] = {}
        missing = []
        for cell, config in zip(wanted, configs, strict=True):
            found = obtain(cell, config)
            if found:
                results.setdefault(cell.candidate.name, []).append(found)
            else:
                missing.append(cell.name)
        if stage.keep:
            chosen(missing)
        done.append(_ranked(of_stage, results))
        candidates = _going_on(candidates, done[-1], stage)
    return _Walk(done, candidates, missing)


def _ranked(candidates: dict[str, list[Candidate]], results: dict[str, list[Result]]):
    ranked = {
        name: [Ranked(one, results[one.name]) for one in of_arm if one.name in results]
        for name, of_arm in candidates.items()
    }
    return {name: sorted(some, key=lambda one: one.loss) for name, some in ranked.items()}


def _going_on(candidates, ranked: StageResults, stage: Stage) -> dict[str, list[Candidate]]:
    """The best of every arm; an arm that skipped the stage as it is."""
    if not stage.keep:
        return candidates
    chosen = lambda some: going_on([one.candidate for one in some], stage)
    best = {name: chosen(some) for name, some in ranked.items()}
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
