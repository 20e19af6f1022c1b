# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table of all finished runs: DIR/cells.csv, with curves.csv and configs.json beside it.

They belong into version control: a study goes on from a fresh clone where the table ends.
"""

import csv
import fcntl
import io
import json
import math
import pathlib
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.csv

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.config_dict import flatten, to_dict
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.study.spec import Cell, identity, short_hash

CURVE_POINTS = 25


class Result(NamedTuple):
    """A line of cells.csv."""

    cell: str  # Cell.key
    arm: str
    chosen: str  # what stages varied, JSON
    steps: int
    seed: int
    status: str  # finished, or diverged: the run stopped as not finite
    val_loss: float  # nats a token, over the whole held-out set; not finite where diverged
    val_bpb: float  # bits a byte of text; NaN: not known
    backbone: int  # parameters
    tables: int  # parameters
    table_bytes: int
    tokens: int
    train_flops: float  # of the whole run
    step_seconds: float  # median
    seconds: float  # step_seconds times steps
    device: str
    data: str  # fingerprint, shortened
    commit: str
    config: str  # digest of all that decides the result
    jax: str = ""  # version, of all processes that trained it; empty: not noted then


class CurvePoint(NamedTuple):
    """A line of curves.csv: the mean training loss around a step."""

    cell: str
    step: int
    loss: float


class Table:
    """Results by cell, on disk after every change; several studies may add at a time."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self.refresh()

    def refresh(self) -> None:
        """Read what others have added.

        Raises ConfigError if a file is damaged, DataError if runs were made with different data.
        """
        self._results = _read_results(self._folder / "cells.csv")
        self._require_data()
        path = self._folder / "configs.json"
        try:
            saved = json.loads(path.read_text()) if path.exists() else {"base": {}, "cells": {}}
            self._base, self._configs = dict(saved["base"]), dict(saved["cells"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); restore it.") from error
        if unknown := self._results.keys() - self._configs.keys():
            raise ConfigError(
                f"{path} lacks the configuration of {', '.join(sorted(unknown)[:3])}, which are in "
                "cells.csv; restore both files of one commit."
            )

    def get(self, cell: Cell, config: Config, data: str | None = None) -> Result | None:
        """Return the finished run of `cell`, if there is one.

        data: fingerprint of what the run would be trained on; None: there are none at hand.

        Raises:
            ConfigError: it was made with another configuration.
            DataError: it, or anything else in the table, was made with other data.
        """
        self._require_data(data)
        result = self._results.get(cell.key)
        if result is None:
            return None
        now, then = _plain(identity(config)), self._base | self._configs[cell.key]
        then |= {"train.steps": result.steps, "train.seed": result.seed}
        fields = flatten(to_dict(config)).keys()
        lines = [
            f"  {key}: {value!r} in the table, {now.get(key, 'no such field')!r} now\n"
            for key, value in sorted(then.items())  # fields added since change nothing
            if key not in fields or now.get(key, value) != value
        ]
        if lines:
            raise ConfigError(
                f"{cell.name} ({cell.key}) is finished in {self._folder}, with another "
                f"configuration:\n{''.join(lines)}Set these fields in the arm or the study as they "
                "were; or, to run it again, take its line out of cells.csv and delete its folder "
                "under --runs."
            )
        return result

    def add(self, result: Result, config: Config, curve: list[tuple]) -> None:
        """Write down a run that has ended. Raises DataError: the others had other data."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("a") as file:  # NFS locks only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX)
            self.refresh()
            self._require_data(result.data)
            flat = _plain(identity(config))
            self._base = self._base or flat
            differs = {key: value for key, value in flat.items() if self._base.get(key) != value}
            self._results[result.cell], self._configs[result.cell] = result, differs
            curves = self.curves() | {result.cell: curve}
            points = [(cell, step, f"{loss:.4f}") for cell in curves for step, loss in curves[cell]]
            write_csv(self._folder / "curves.csv", CurvePoint, points)
            cells = (f'"{key}": {json.dumps(one)}' for key, one in self._configs.items())
            base, cells = json.dumps(self._base, indent=1), ",\n".join(cells)
            text = f'{{"base": {base},\n"cells": {{\n{cells}}}}}\n'
            _replace(self._folder / "configs.json", text)
            # Last, as it says that the run is finished.
            write_csv(self._folder / "cells.csv", Result, self._results.values())

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return (step, mean training loss around it) of every cell."""
        curves = {}
        for cell, step, loss in read_csv(self._folder / "curves.csv", CurvePoint):
            curves.setdefault(cell, []).append((step, loss))
        return curves

    def _require_data(self, data: str | None = None) -> None:
        known = {data, *(result.data for result in self._results.values())} - {None}
        if len(known) > 1:
            raise DataError(
                f"{self._folder} would have runs with the data {', '.join(sorted(known))}. Losses "
                "on different texts cannot be compared: use the data of those that are there, or "
                "another --results folder."
            )


def _plain(fields: dict[str, object]) -> dict[str, object]:
    """Return fields as they are read back from JSON."""
    return json.loads(json.dumps(fields))


def make_result(
    cell: Cell, config: Config, records: list[dict], *, diverged: bool = False, **about: str
) -> tuple[Result, list[tuple]]:
    """Return the line of a run and its curve, (step, loss), from the lines of metrics.jsonl.

    diverged: the run ended as not finite, whatever its last loss. about: device, data, commit, jax.
    """
    steps = [record for record in records if record["step"] > 0]
    last = steps[-1] if steps else {"step": 0}
    finite = math.isfinite(last.get("val_loss") or math.nan)
    finished = finite and last["step"] == config.train.steps and not diverged
    counts = flops.count(config.model, seq_len=config.train.seq_len)
    tokens = config.train.batch_size * config.train.seq_len * config.train.steps
    durations = [record["step_seconds"] for record in steps]
    median = float(np.median(durations)) if durations else math.nan
    result = Result(
        cell=cell.key, arm=cell.candidate.arm.name, steps=cell.steps, seed=cell.seed,
        chosen=json.dumps(dict(cell.candidate.chosen)),
        status="finished" if finished else "diverged",
        val_loss=last["val_loss"] if finished else math.inf,
        val_bpb=(last["val_bpb"] or math.nan) if finished else math.inf,
        backbone=counts.backbone, tables=counts.tables, table_bytes=counts.table_bytes,
        tokens=tokens, train_flops=float(counts.train_flops) * tokens,
        step_seconds=median, seconds=median * config.train.steps,
        config=short_hash(identity(config)), **about,
    )  # fmt: skip
    losses = [(record["step"], record["loss"]) for record in steps if record["loss"] is not None]
    size = -(-config.train.steps // CURVE_POINTS)
    means = [np.mean(losses[i : i + size], axis=0) for i in range(0, len(losses), size)]
    return result, [(round(step), float(loss)) for step, loss in means]


def require_writable(option: str, folder: pathlib.Path) -> None:
    """Raise ConfigError if files cannot be written into a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"--{option}={folder} cannot be written: {error}") from error


def _read_results(path: pathlib.Path) -> dict[str, Result]:
    found = {}
    for number, one in enumerate(read_csv(path, Result), start=2):
        status = "finished" if math.isfinite(one.val_loss) else "diverged"
        sizes = one.steps, one.backbone, one.tokens, one.train_flops
        if one.status != status or min(sizes) <= 0 or one.cell in found:
            raise ConfigError(
                f"{path}, line {number}: {one.cell} has two lines, a size that is not positive, or "
                f"is {one.status} with a validation loss of {one.val_loss}. Restore or remove it."
            )
        found[one.cell] = one
    return found


def read_csv(path: pathlib.Path, kind: type[NamedTuple]) -> list:
    """Return the lines of a CSV file as tuples of `kind`; none if it is missing.

    Columns of fields with a default may be missing, too. Raises ConfigError: it is damaged.
    """
    if not path.exists():
        return []
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    types = {name: types[type_] for name, type_ in kind.__annotations__.items()}
    try:
        table = pyarrow.csv.read_csv(
            path,
            pyarrow.csv.ReadOptions(use_threads=False),  # errors name the line
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[]),
        )
        return [kind(**line) for line in table.to_pylist()]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}. Restore it.") from error


def write_csv(
    path: pathlib.Path, kind: type[NamedTuple], lines: Iterable[tuple], *, digits: int = 6
) -> None:
    """Replace a CSV file: the fields of `kind`, then `lines`."""
    text = io.StringIO()
    short = lambda value: f"{value:.{digits}g}" if isinstance(value, float) else value
    csv.writer(text, lineterminator="\n").writerows(
        [kind._fields, *([short(value) for value in line] for line in lines)]
    )
    _replace(path, text.getvalue())


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
