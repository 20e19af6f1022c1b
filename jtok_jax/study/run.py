# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A study from stage to stage: what is trained, what is in the table already, what goes on."""

import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

from tqdm import tqdm

from jtok_jax.config import Config
from jtok_jax.data.ngrams import open_ngrams
from jtok_jax.errors import ConfigError, DataError, Preempted
from jtok_jax.study.estimate import Estimate, estimate
from jtok_jax.study.results import Result, Table, require_writable
from jtok_jax.study.spec import Candidate, Cell, Study, cells, check_study, expand, resolve, select
from jtok_jax.study.trainer import Paths, StudyError, data_fingerprint, train_cell, workdir_of
from jtok_jax.training.guards import StopSignal

NGRAMS = "ngrams.json"  # the digest of the n-grams that a table's runs read


class Ranked(NamedTuple):
    """A candidate and its results, one a seed."""

    candidate: Candidate
    results: list[Result]

    @property
    def estimate(self) -> Estimate:
        return estimate([result.val_loss for result in self.results])

    @property
    def loss(self) -> float:
        return self.estimate.mean

    @property
    def num_diverged(self) -> int:
        return sum(result.status == "diverged" for result in self.results)


StageResults = dict[str, list[Ranked]]  # by arm, best first


class Progress(NamedTuple):
    """How far a study has come."""

    stages: list[StageResults]
    candidates: dict[str, list[Candidate]]  # of the last stage, of the arms that have come so far
    missing: list[str]  # runs without a result, but for those of stages that an arm cannot reach

    def require(self, found: object, paths: Paths) -> None:
        """Raise ConfigError with the runs that are missing, if nothing was `found`."""
        if not found:
            raise ConfigError(
                f"{paths.results} lacks {len(self.missing)} of the study's runs: "
                f"{'; '.join(self.missing[:3])} ... Run it first (python -m jtok_jax.study run)."
            )


def run_study(study: Study, paths: Paths, *, keep_checkpoints: bool) -> list[StageResults]:
    """Train what is not in the table: one arm after the other, each through all stages.

    A run that fails is reported, and its arm ends with the stage if that chooses; others go on.

    Raises:
        ConfigError, DataError: before anything runs, as `check_study` and `Table` do.
        StudyError: runs failed.
        WorkdirError: another study, or what is left of one, is training what comes next.
        Preempted: asked to stop; the run under way is saved.
    """
    check_study(study, paths.root, **paths.inputs)
    table = Table(paths.results)
    look_up = lambda cell, config: table.get(cell, config, data=data_fingerprint(config))
    if _walk(study, paths, look_up).missing:
        table.curves()  # readable?
        require_writable("results", paths.results)
        require_writable("runs", paths.runs)
        _require_same_ngrams(paths)
    bar = tqdm(total=_count_steps(study), unit="step", desc="study", dynamic_ncols=True)
    with bar, StopSignal() as stop:

        def look_up_or_train(cell: Cell, config: Config) -> Result | None:
            table.refresh()  # another study may have trained it since
            if result := look_up(cell, config):
                bar.total -= cell.steps
                return result
            end, data = bar.n + cell.steps, data_fingerprint(config)
            bar.set_postfix_str(cell.name)
            try:
                result, curve = train_cell(cell, config, paths, bar, stop, data=data)
                table.add(result, config, curve)
                tqdm.write(f"{result.cell} {result.val_loss:.4f} nats/token: {cell.name}")
                if not keep_checkpoints:
                    shutil.rmtree(workdir_of(cell, paths) / "checkpoints", ignore_errors=True)
            except StudyError as error:
                tqdm.write(f"FAILED {cell.name}: {error}", file=sys.stderr)
            bar.update(end - bar.n)  # a failed run is done with, too
            if stop.name:
                raise Preempted(f"{cell.name} is finished. The same command goes on.")
            return result

        progress = _walk(study, paths, look_up_or_train)
    if progress.missing:
        ended = [arm.name for arm in study.arms if arm.name not in progress.candidates]
        ended = f" {', '.join(ended)} could not go on to the next stage." * bool(ended)
        raise StudyError(f"{len(progress.missing)} of the runs failed, see above.{ended}")
    return progress.stages


def _require_same_ngrams(paths: Paths) -> None:
    """Note which n-grams the table's runs read. Raises DataError: earlier ones read others."""
    if not paths.ngrams:
        return
    digest, note = open_ngrams(pathlib.Path(paths.ngrams)).digest, paths.results / NGRAMS
    if note.exists() and json.loads(note.read_text()) != digest:
        raise DataError(
            f"Runs in {paths.results} read other n-grams than those of {paths.ngrams}. Use their "
            "file, or another --results."
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(digest) + "\n")


def load_progress(study: Study, paths: Paths) -> Progress:
    """Return what the table has of a study, once it is checked as `check_study` does."""
    check_study(study, paths.root, **paths.inputs)
    return _walk(study, paths, Table(paths.results).get)


def _walk(study: Study, paths: Paths, obtain: Callable[[Cell, Config], Result | None]) -> Progress:
    """Take one arm after the other through all stages, or to one that chooses and lacks a run."""
    progress = Progress([{arm.name: [] for arm in study.arms} for _ in study.stages], {}, [])
    for arm in study.arms:
        candidates = [Candidate(arm)]
        for stage, by_arm in zip(study.stages, progress.stages, strict=True):
            expanded = expand(candidates, stage)
            results, missing = {one.name: [] for one in expanded}, []
            for cell in cells(study, stage, expanded):
                if result := obtain(cell, resolve(cell, paths.root, **paths.inputs)):
                    results[cell.candidate.name].append(result)
                else:
                    missing.append(cell.name)
            progress.missing.extend(missing)
            if stage.keep and missing:
                break
            ranked = [Ranked(one, results[one.name]) for one in expanded if results[one.name]]
            ranked.sort(key=lambda one: one.loss)
            by_arm[arm.name] = ranked
            if not stage.keep:
                progress.candidates[arm.name] = expanded
            elif ranked:
                candidates = select([one.candidate for one in ranked], stage)
    return progress


def _count_steps(study: Study) -> int:
    """Return the training steps of a study, if nothing fails."""
    total = 0
    for arm in study.arms:
        candidates = [Candidate(arm)]
        for stage in study.stages:
            expanded = expand(candidates, stage)
            total += stage.steps * len(stage.seeds) * len(expanded)
            candidates = select(expanded or candidates, stage)
    return total
