# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Measures a run's steps and writes them: metrics.jsonl, TensorBoard and the console."""

import collections
import contextlib
import datetime
import importlib
import json
import math
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.errors import CheckpointError, ConfigError
from jtok_jax.model.attention import choice_of
from jtok_jax.model.operations import Operations
from jtok_jax.model.params import abstract_params, declared_tables
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.step import StepMetrics

FILE_NAME = "metrics.jsonl"


class Writer(Protocol):
    """Takes the numbers of a run; the run's first process alone has writers."""

    def write(self, step: int, values: dict[str, object]) -> None:
        """Write `values` of `step`; a second call for the newest step adds to it."""

    def close(self) -> None:
        """Write what is held back; called once, also where the run fails."""


class JsonLinesWriter:
    """Writes metrics.jsonl, one JSON object a step; drops steps that a resumed run repeats."""

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self._path, self._file = workdir / FILE_NAME, None
        if first_step == 0 and self._path.exists() and self._path.stat().st_size:
            self._path.rename(self._path.with_suffix(".before.jsonl"))  # of a run without a save
        lines = _lines_up_to(self._path, first_step - 1)
        self._newest = json.loads(lines[-1])["step"] if lines else None
        self._replace(lines)

    def write(self, step: int, values: dict[str, object]) -> None:
        if step == self._newest:
            *lines, newest = _lines_up_to(self._path, step)
            self._replace([*lines, _line(json.loads(newest) | values)])
            return
        self._file.write(_line({"step": step} | values))
        self._file.flush()
        self._newest = step

    def close(self) -> None:
        self._file.close()

    def _replace(self, lines: list[str]) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(lines))
        partial.replace(self._path)
        if self._file:
            self._file.close()
        self._file = self._path.open("a")


class TensorBoardWriter:
    """Writes DIR/tensorboard; its readers forget `first_step` and later of an earlier process."""

    def __init__(self, workdir: pathlib.Path, first_step: int):
        tensorboardX = _package("tensorboardX", "logging.tensorboard")
        folder = str(workdir / "tensorboard")
        self._board = tensorboardX.SummaryWriter(folder, purge_step=first_step)

    def write(self, step: int, values: dict[str, object]) -> None:
        for name, value in _numbers(values):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class WandbWriter:
    """Writes to a project of Weights & Biases; a resumed run goes on in the same run there.

    Steps that it repeats are not written again: W&B takes no step twice.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        wandb = _package("wandb", "logging.wandb")
        config, path = json.loads((workdir / "config.json").read_text()), workdir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        project = {"project": config["logging"]["wandb"], "id": path.read_text()}
        self._run = wandb.init(**project, dir=workdir, resume="allow", config=config)

    def write(self, step: int, values: dict[str, object]) -> None:
        self._run.log(dict(_numbers(values)), step=step)

    def close(self) -> None:
        self._run.finish()


def _package(name: str, field: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{field} is set but {name} is not installed; pip install {name}, or leave it off: "
            "metrics.jsonl has everything."
        ) from error


# Beside metrics.jsonl, by the field of `logging` that asks for it.
WRITERS: dict[str, Callable[[pathlib.Path, int], Writer]] = {
    "tensorboard": TensorBoardWriter, "wandb": WandbWriter
}  # fmt: skip


def open_writers(config: Config, workdir: pathlib.Path, first_step: int) -> list[Writer]:
    """Return the writers of a run whose first record is of `first_step`.

    Raises:
        ConfigError: a writer that was asked for is not installed; metrics.jsonl is as it was.
        CheckpointError: metrics.jsonl is damaged.
    """
    asked = [make for name, make in WRITERS.items() if getattr(config.logging, name)]
    others = [make(workdir, first_step) for make in asked]
    return [JsonLinesWriter(workdir, first_step), *others]


def step_record(metrics: StepMetrics, health: dict[str, object]) -> dict[str, object]:
    """Return the measurements of a step as JSON values; waits for it. Not finite becomes None."""
    values = jax.device_get(metrics)._asdict()
    words, ngrams = values.pop("batch_hash"), values.pop("ngrams")
    values |= ngrams | health
    plain = {name: _plain(value) for name, value in values.items() if value is not None}
    return {"batch_hash": "".join(f"{word:08x}" for word in words)} | plain


class Timer:
    """Measures the steps, each from the end of the one before, without what was left out."""

    def __init__(self, config: Config):
        self._tokens = config.train.batch_size * config.train.seq_len
        counts = flops.count(config.model, seq_len=config.train.seq_len)
        peak = flops.peak_flops(jax.devices()[0].device_kind)
        self._flops_per_token = counts.train_flops
        self._peak = peak * jax.device_count() if peak else None
        self._steps, self._seconds, self._last = 0, 0.0, time.perf_counter()

    def start(self) -> None:
        """Begin the next step now."""
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave out the time of what runs meanwhile, such as a validation."""
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def step(self, *, data_wait: float) -> dict[str, float]:
        """Return the speed of the step that just ended, `data_wait` seconds after its batch."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        speed = self._tokens / seconds
        record = {"tokens_per_second": speed, "step_seconds": seconds, "data_wait": data_wait}
        if self._peak:
            record["mfu"] = speed * self._flops_per_token / self._peak
        return record

    def seconds_for(self, steps: int) -> float | None:
        """Return what so many more steps take by the mean of all; None before two were timed."""
        return steps * self._seconds / self._steps if self._steps >= 2 else None


def console_line(
    step: int, values: dict[str, object], *, steps: int, seconds_left: float | None
) -> str:
    """Return one line of progress."""
    loss = values["loss"]
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        "loss  not finite" if loss is None else f"loss {loss:.4f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"MFU {100 * values['mfu']:.1f}%" if "mfu" in values else "MFU n/a",
        f"{1000 * values['step_seconds']:.0f} ms/step",
        f"data wait {1000 * values['data_wait']:.0f} ms",
    ]
    if seconds_left is not None:
        parts.append(f"{datetime.timedelta(seconds=round(seconds_left))} left")
    if values.get("ngram_shortened"):
        share = f"{values['ngram_shortened']:.2%} of tokens"
        parts.append(f"{share} lack room for their n-gram: model.arms.scone.room")
    if values["bad_steps"]:
        parts.append(f"{values['bad_steps']} steps skipped")
    return "  ".join(parts)


def parameter_table(config: Config, operations: dict[str, Operations]) -> str:
    """Return the counts of the model and its tables, for the start of a run.

    Args:
        operations: by table, see `table_operations`.
    """
    counts = flops.count(config.model, seq_len=config.train.seq_len)
    numbers = [
        ("backbone", counts.backbone, "parameters"),
        ("tables", counts.tables, f"parameters, {_mebibytes(counts.table_bytes)} MiB"),
        ("total", counts.total, "parameters"),
        ("active", counts.active, "parameters a token, tables left out"),
        ("optimizer", _optimizer_bytes(config), "bytes of state"),
        ("FLOPs", counts.train_flops, f"a token in training at length {config.train.seq_len}"),
    ]
    lines = [f"{name:>10} {value:>18,} {unit}" for name, value, unit in numbers]
    attention = choice_of(config.model, config.train.seq_len)
    lines.append(f"{'attention':>10} {attention.kind:>18} of tokens: {attention.reason}")
    if config.train.compiler_options:
        lines.append(f"{'compiler':>10} {config.train.compiler_options}")
    tables = declared_tables(config.model)
    entries = collections.Counter()  # of all rows of an id, by stream
    for table in tables.values():
        entries[table.stream] += math.prod(table.grads_shape) * table.shape[-1]
    for stream, size in sorted(entries.items()):
        rows = config.unique_rows(stream)
        limit = " (train.max_unique_ids)" if stream == "token" else ""
        lines.append(
            f"{'rows':>10} {rows:>18,} by {stream} at most of each table in a step{limit}, "
            f"gradients {_mebibytes(4 * rows * size)} MiB"
        )
    for choice in dict.fromkeys(operations.values()):
        named = [tables[name].owner for name, one in operations.items() if one == choice]
        names = ", ".join(dict.fromkeys(named))
        lines.append(f"{'operations':>10} {choice.name:>18} on tables of {names}: {choice.reason}")
    return "\n".join(lines)


def _optimizer_bytes(config: Config) -> int:
    masters = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for name, leaf in abstract_params(config.model).items()
    }
    leaves = jax.tree.leaves(jax.eval_shape(make_optimizer(config).init, masters))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _numbers(record: dict[str, object]) -> Iterator[tuple[str, float]]:
    """Yield every number of a record by name, those of a list as NAME/0, NAME/1, ..."""
    for name, value in record.items():
        if isinstance(value, list):
            yield from _numbers({f"{name}/{place}": part for place, part in enumerate(value)})
        elif isinstance(value, int | float):
            yield name, value


def _plain(value: np.ndarray) -> object:
    """Return the JSON value of a scalar or array; what is not finite becomes null."""
    if value.ndim:
        return [_plain(item) for item in value]
    number = value.item()
    return number if math.isfinite(number) else None


def _line(record: dict[str, object]) -> str:
    finite = lambda value: not isinstance(value, float) or math.isfinite(value)
    record = {name: value if finite(value) else None for name, value in record.items()}
    return json.dumps(record, allow_nan=False) + "\n"


def _lines_up_to(path: pathlib.Path, step: int) -> list[str]:
    """Return the lines of steps up to `step`, without one at the end that a kill cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        while lines and not (lines[-1].endswith("\n") and json.loads(lines[-1])["step"] <= step):
            lines.pop()
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{path}, line {len(lines)} is damaged ({error!r}). Checkpoints are whole: move that "
            "file away, and the same command goes on with a new one."
        ) from error
    return lines
