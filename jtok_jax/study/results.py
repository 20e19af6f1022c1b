# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table of all finished runs: DIR/cells.csv, with curves.csv and configs.json beside it.

They belong into version control: a study goes on from a fresh clone where the table ends.
"""

import contextlib
import csv
import fcntl
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.config_dict import flatten, to_dict
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.study.spec import Cell, digest, identity

CURVE_POINTS = 25
CURVES = {"cell": str, "step": int, "loss": float}


class Result(NamedTuple):
    """A line of the table."""

    cell: str  # Cell.key
    arm: str
    chosen: str  # what stages varied, JSON
    steps: int
    seed: int
    status: str  # finished, or diverged: the run stopped as not finite
    val_loss: float  # nats a token, over the whole held-out set; not finite where diverged
    val_bpb: float  # bits a byte of text
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


class Table:
    """Results by cell, on disk after every change; several studies may add at a time."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self.refresh()

    def require_usable(self) -> None:
        """Before anything is trained for it. Raises ConfigError: it cannot be read or written."""
        self.curves()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder):
                _replace(self._folder / "probe", "")
                (self._folder / "probe").unlink()
        except OSError as error:
            raise ConfigError(f"--results={self._folder} cannot be written: {error}") from error

    def refresh(self) -> None:
        """Read what others have added."""
        path = self._folder / "configs.json"
        results = _read(self._folder / "cells.csv")
        self._results = {result.cell: result for result in results}
        if len(self._results) < len(results):
            cells = [result.cell for result in results]
            twice = next(cell for cell in cells if cells.count(cell) > 1)
            raise ConfigError(f"{self._folder / 'cells.csv'} has two lines of {twice}; keep one.")
        try:
            text = path.read_text() if path.exists() else '{"base": {}, "cells": {}}'
            self._configs = json.loads(text)
            if not all(isinstance(self._configs[name], dict) for name in ("base", "cells")):
                raise ValueError('"base" or "cells" is no object')
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is damaged ({error}); restore it.") from error
        unknown = self._results.keys() - self._configs["cells"].keys()
        if unknown:
            raise ConfigError(
                f"{path} lacks the configuration of {', '.join(sorted(unknown)[:3])}, which are in "
                "cells.csv; restore both files of one commit."
            )

    def get(self, cell: Cell, config: Config, data: str | None = None) -> Result | None:
        """The finished run of `cell`, or None.

        data: fingerprint of what the run would be trained on; None: there are none at hand.

        Raises:
            ConfigError: it was made with another configuration.
            DataError: it, or anything else in the table, was made with other data.
        """
        others = {result.data for result in self._results.values()} - {data}
        if data is not None and others:
            raise DataError(
                f"The runs in {self._folder} were made with the data {', '.join(sorted(others))}; "
                f"these are {data}. Losses on different texts cannot be compared: use those data, "
                "or another --results folder."
            )
        result = self._results.get(cell.key)
        if result is None:
            return None
        if (result.steps, result.seed) != (cell.steps, cell.seed):
            raise ConfigError(
                f"{self._folder / 'cells.csv'} says {result.steps} steps and seed {result.seed} of "
                f"{cell.key}, which has {cell.steps} and {cell.seed}: restore the file."
            )
        now, then = identity(config), self._configs["base"] | self._configs["cells"][cell.key]
        fields = flatten(to_dict(config)).keys()
        lines = [
            f"  {key}: {then[key]!r} in the table, {now.get(key, 'no such field')!r} now"
            for key in sorted(then)  # fields added since change nothing
            if (key in now and then[key] != json.loads(json.dumps(now[key]))) or key not in fields
        ]
        if lines:
            raise ConfigError(
                f"{cell.name} ({cell.key}) is finished in {self._folder}, with another "
                "configuration:\n" + "\n".join(lines) + "\nSet these fields in the arm or the "
                "study as they were; or, to run it again, take its line out of cells.csv and "
                "delete its folder under --runs."
            )
        return result

    def add(self, result: Result, config: Config, curve: list[tuple[int, float]]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder):
            self.refresh()
            if others := {one.data for one in self._results.values()} - {result.data}:
                raise DataError(
                    f"{self._folder} got runs with the data {', '.join(sorted(others))} meanwhile; "
                    f"{result.cell} was trained on {result.data} and is not added. Use another "
                    "--results folder: the same command adds it there without training."
                )
            self._add(result, config, curve)

    def _add(self, result: Result, config: Config, curve: list[tuple[int, float]]) -> None:
        flat = json.loads(json.dumps(identity(config)))
        base = self._configs["base"] or flat
        differs = {key: value for key, value in flat.items() if base.get(key) != value}
        self._configs = {
            "base": base,
            "cells": self._configs["cells"] | {result.cell: differs},
        }
        self._results[result.cell] = result
        path = self._folder / "curves.csv"
        curves = [line for line in read_csv(path, CURVES) if line[0] != result.cell]
        curves += [[result.cell, step, loss] for step, loss in curve]
        _write(path, CURVES, [[cell, step, f"{loss:.4f}"] for cell, step, loss in curves])
        text = json.dumps(self._configs["base"], indent=1)
        cells = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(value)}"
            for key, value in self._configs["cells"].items()
        )
        _replace(self._folder / "configs.json", f'{{"base": {text},\n"cells": {{\n{cells}}}}}\n')
        lines = [[_text(value) for value in one] for one in self._results.values()]
        _write(self._folder / "cells.csv", Result._fields, lines)  # last: it says finished

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(step, mean training loss around it) of every cell."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for cell, step, loss in read_csv(self._folder / "curves.csv", CURVES):
            curves.setdefault(cell, []).append((step, loss))
        return curves


def measured(
    cell: Cell,
    config: Config,
    records: list[dict],
    *,
    device: str,
    data: str,
    commit: str,
    jax: str,
    diverged: bool = False,
) -> tuple[Result, list[tuple[int, float]]]:
    """The line of a run and its curve, from what it wrote into metrics.jsonl.

    diverged: the run said so, whatever its last loss is.
    """
    steps = [record for record in records if record["step"] > 0]
    last = steps[-1] if steps else {}
    val_loss = last.get("val_loss") or math.nan
    whole = last.get("step") == config.train.steps and math.isfinite(val_loss)
    finished = whole and not diverged
    counts = flops.count(config.model, seq_len=config.train.seq_len)
    tokens = config.train.batch_size * config.train.seq_len * config.train.steps
    durations = sorted(record["step_seconds"] for record in steps)
    median = durations[len(durations) // 2] if durations else float("nan")
    result = Result(
        cell=cell.key,
        arm=cell.candidate.arm.name,
        chosen=json.dumps(dict(cell.candidate.chosen)),
        steps=cell.steps,
        seed=cell.seed,
        status="finished" if finished else "diverged",
        val_loss=last["val_loss"] if finished else float("inf"),
        val_bpb=last["val_bpb"] if finished else float("inf"),
        backbone=counts.backbone,
        tables=counts.tables,
        table_bytes=counts.table_bytes,
        tokens=tokens,
        train_flops=float(counts.train_flops) * tokens,
        step_seconds=median,
        seconds=median * config.train.steps,
        device=device,
        data=data,
        commit=commit,
        config=digest(config),
        jax=jax,
    )
    losses = [(record["step"], record["loss"]) for record in steps if record["loss"] is not None]
    size = -(-config.train.steps // CURVE_POINTS)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    mean = lambda part, place: sum(one[place] for one in part) / len(part)
    return result, [(round(mean(part, 0)), mean(part, 1)) for part in parts]


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as file:  # NFS locks only what is open for writing
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: pathlib.Path) -> list[Result]:
    lines = read_csv(path, Result.__annotations__, Result._field_defaults)
    results = [Result(*line) for line in lines]
    for number, result in enumerate(results, start=2):
        expected = "finished" if math.isfinite(result.val_loss) else "diverged"
        sizes = result.steps, result.backbone, result.tokens, result.train_flops
        if result.status != expected or min(sizes) <= 0:
            raise ConfigError(
                f"{path}, line {number}: {result.status} with a validation loss of "
                f"{result.val_loss}, or a size that is not positive: restore or remove it."
            )
    return results


def read_csv(
    path: pathlib.Path,
    kinds: Mapping[str, type],
    later: Mapping[str, object] = MappingProxyType({}),
) -> list[list]:
    """Lines of a CSV file; of none if it is missing. Columns of `later` may be missing, too.

    Raises:
        ConfigError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found, *lines = [*csv.reader(file)] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read ({error}): restore it.") from error
    head = list(kinds)
    if found != head[: len(found)] or not {*head[len(found) :]} <= later.keys():
        begins = f"begins with {','.join(found)}" if found else "is empty"
        raise ConfigError(f"{path} {begins}; expected {','.join(head)}.")
    parsed = []
    for number, line in enumerate(lines, start=2):
        if len(line) != len(found):
            raise ConfigError(
                f"{path}, line {number} has {len(line)} of {len(found)} fields (a conflict of a "
                "merge?): restore or remove it."
            )
        try:
            values = [kind(value) for kind, value in zip(kinds.values(), line, strict=False)]
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}: restore or remove it.") from error
        parsed.append(values + [later[name] for name in head[len(found) :]])
    return parsed


def _write(path: pathlib.Path, head: Iterable[str], lines: list[list]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *lines])
    partial.replace(path)


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
