# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A study from stage to stage: what is trained, what is in the table already, what goes on."""

import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

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
    require_folder,
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
    """Train what is not in the table: one arm after the other, each through all stages.

    A run that fails is reported, and its arm ends with the stage if that chooses; others go on.

    Raises:
        ConfigError, DataError: before anything runs: arms that cannot be, or cannot be compared;
            finished runs of another configuration or other data.
        StudyError: runs failed.
        WorkdirError: another study, or what is left of one, is training what comes next.
        Preempted: asked to stop; the run under way is saved.
    """
    check_study(study, places.root, data=places.data)
    table, source = Table(places.results), Fingerprints()
    look = lambda cell, config: table.get(cell, config, data=source.of(config))
    if _walk(study, study.stages, places, look).missing:
        table.require_usable()
        require_folder(places.runs)
    bar = tqdm(total=_steps(study), unit="step", desc="study", dynamic_ncols=True)
    with bar, Stop() as stop:

        def obtain(cell: Cell, config: Config) -> Result | None:
            found = look(cell, config)
            if not found:
                table.refresh()  # another study may have trained it since
                found = look(cell, config)
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

        walk = _walk(study, study.stages, places, obtain)
    if walk.missing:
        ended = f" {', '.join(walk.ended)} could not go on to the next stage." * bool(walk.ended)
        raise StudyError(f"{_runs(walk.missing)} failed, see above.{ended}")
    return walk.done


def finished(study: Study, places: Places) -> tuple[list[StageResults], list[str]]:
    """What the table has of a study, and which runs it lacks, those apart that depend on them.

    Raises:
        ConfigError: it has none of the baseline in the last stage.
        DataError: its runs are of different texts.
    """
    check_study(study, places.root, data=places.data)
    walk = _walk(study, study.stages, places, Table(places.results).get)
    if not walk.done[-1][study.baseline]:
        _raise_missing(walk, places)
    every = [one for stage in walk.done for some in stage.values() for one in some]
    if len(texts := {result.data for one in every for result in one.results}) > 1:
        raise DataError(
            f"{places.results} has runs of this study with the data {', '.join(sorted(texts))}: "
            "losses on different texts cannot be compared. Keep those of one."
        )
    return walk.done, walk.missing


def last_candidates(study: Study, places: Places) -> dict[str, list[Candidate]]:
    """What the last stage trains, of the arms that have come so far.

    Raises:
        ConfigError: the baseline has not.
    """
    check_study(study, places.root, data=places.data)
    walk = _walk(study, study.stages[:-1], places, Table(places.results).get)
    if study.baseline not in walk.candidates:
        _raise_missing(walk, places)
    return expand(walk.candidates, study.stages[-1])


def _raise_missing(walk: "_Walk", places: Places) -> NoReturn:
    raise ConfigError(
        f"{_runs(walk.missing)} not in {places.results}: {'; '.join(walk.missing[:3])} ... "
        "Run the study first (python -m jtok_jax.study run)."
    )


def _runs(names: list[str]) -> str:
    return f"{len(names)} run" + "s" * (len(names) != 1)


class _Walk(NamedTuple):
    done: list[StageResults]
    candidates: dict[str, list[Candidate]]  # of the stage after; without arms that ended before
    missing: list[str]  # runs that could not be obtained
    ended: list[str]  # arms that lack a run of a stage that chooses


def _walk(study: Study, stages: tuple[Stage, ...], places: Places, obtain: Obtain) -> _Walk:
    """One arm after the other through `stages`."""
    arms = start(study)
    walk = _Walk([{arm: [] for arm in arms} for _ in stages], {}, [], [])
    for arm, candidates in arms.items():
        for stage, done in zip(stages, walk.done, strict=True):
            for_stage = expand({arm: candidates}, stage)
            results, missing = _obtain_all(cells(study, stage, for_stage), places, obtain)
            walk.missing.extend(missing)
            if stage.keep and missing:
                walk.ended.append(arm)
                break
            if arm in for_stage:
                done[arm] = _ranked(for_stage[arm], results)
            if stage.keep and done[arm]:
                candidates = going_on([one.candidate for one in done[arm]], stage)
        else:
            walk.candidates[arm] = candidates
    return walk


def _obtain_all(wanted: list[Cell], places: Places, obtain: Obtain):
    """(results by candidate, names of runs without one)."""
    results, missing = {}, []
    for cell in wanted:
        found = obtain(cell, resolve(cell, places.root, data=places.data))
        if found:
            results.setdefault(cell.candidate.name, []).append(found)
        else:
            missing.append(cell.name)
    return results, missing


def _ranked(candidates: list[Candidate], results: dict[str, list[Result]]) -> list[Ranked]:
    ranked = [Ranked(one, results[one.name]) for one in candidates if one.name in results]
    return sorted(ranked, key=lambda one: one.loss)


def _steps(study: Study) -> int:
    """Training steps of a study, if nothing fails."""
    candidates, total = start(study), 0
    for stage in study.stages:
        of_stage = expand(candidates, stage)
        total += stage.steps * len(cells(study, stage, of_stage))
        if stage.keep:
            candidates |= {name: going_on(some, stage) for name, some in of_stage.items()}
    return total
