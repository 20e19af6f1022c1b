# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Compares a run's configuration and data with those that its workdir was written with."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator

from jtok_jax.checks import names
from jtok_jax.config import CHANGEABLE, Config
from jtok_jax.config_dict import completed, differences, flatten, to_dict
from jtok_jax.errors import CheckpointError, ConfigError, DataError, WorkdirError

CHECKPOINTS = "checkpoints"  # folder of a workdir
CONFIG_FILE = "config.json"
# What may change when a run goes on. What data.path and data.ngrams hold is checked by fingerprint,
# train.steps by schedule.steps. Another mesh, and other compiler options, sum in another order and
# so change the last bits.
MAY_CHANGE = (
    "train.steps", "train.log_every", "train.stall_seconds", "checkpoint.", "evaluation.",
    "logging.", "profile.", "data.path", "data.ngrams", "data.read_threads", "data.prefetch",
    "data.verify", "mesh.", "model.jtok.implementation", "model.attention", "model.remat",
    "model.loss_chunk", "train.compiler_options", "train.max_unique_ids", "train.start_seconds",
    "train.heartbeat_seconds", "train.allow_changes",
)  # fmt: skip
HISTORY_FILE = "history.json"


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Write the configuration into a workdir, after comparing it if there is a checkpoint.

    What differs from the run's, as train.allow_changes says, is written with the next checkpoint.

    Raises:
        ConfigError: the workdir belongs to a run with another configuration.
        CheckpointError: its configuration cannot be read, or it has parameters without a state.
    """
    path = workdir / CONFIG_FILE
    if (workdir / CHECKPOINTS / "0").exists():  # of `Checkpoints.save_params`
        raise CheckpointError(
            f"{workdir} holds a model, no run to go on with. Start a run from it: "
            f"another --workdir, with --config=configs/pretrained.py:{workdir}"
        )
    changes = []
    if path.exists() and any((workdir / CHECKPOINTS).glob("*")):  # else nothing would be lost
        changes = require_same_config(_saved_config(path), config, workdir)
    if not changes:
        keep_config(workdir, config)


def keep_config(workdir: pathlib.Path, config: Config) -> None:
    """Write the configuration that a run has."""
    _keep(workdir / CONFIG_FILE, (json.dumps(to_dict(config), indent=1) + "\n").encode())


def keep_tokenizer(workdir: pathlib.Path, path: pathlib.Path | None) -> None:
    """Copy a tokenizer.json into a run, which so needs no data to write or read text."""
    if path is not None and path.is_file():
        _keep(workdir / path.name, path.read_bytes())


def keep_history(workdir: pathlib.Path, history: list[dict]) -> None:
    """Write what was changed in a run, and after which steps."""
    _keep(workdir / HISTORY_FILE, (json.dumps(history, indent=1) + "\n").encode())


def _keep(path: pathlib.Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)


def _saved_config(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # neither JSON nor UTF-8
        raise CheckpointError(
            f"{path} is damaged ({error}). Checkpoints have a copy, which is compared as well: "
            "delete this file and run the same command."
        ) from error


def require_same_config(saved: dict, config: Config, workdir: pathlib.Path) -> list[str]:
    """Return the differences that train.allow_changes names, a line each.

    Raises ConfigError with a diff if `saved` would give other numbers than `config` otherwise.
    """
    old, new = flatten(completed(saved)), flatten(to_dict(config))
    old["schedule.steps"] = old.get("schedule.steps") or old["train.steps"]
    new["schedule.steps"] = config.schedule_steps
    lines = differences(old, new, "in the run", "now")
    lines = [line for line in lines if not line.startswith(MAY_CHANGE)]
    if all(_is_allowed(line.partition(":")[0], config) for line in lines):
        return lines
    advice = "Use the same values, or another --workdir."
    fields = [line.partition(":")[0] for line in lines]
    if set(fields) <= set(CHANGEABLE) and config.data.source != "synthetic":
        flag = f"--config.train.allow_changes={','.join(fields)}"
        advice += f"\nOr go on with the new values from here on: {flag}"
    if any("schedule.steps" in line for line in lines):
        kept = f"--config.schedule.steps={old['schedule.steps']}"
        lines.append(f"(to train longer on the same schedule, pass {kept})")
    raise ConfigError(
        f"{workdir} belongs to a run with another configuration:\n"
        + "".join(f"  {line}\n" for line in lines)
        + f"Nothing was changed. {advice}"
    )


def _is_allowed(field: str, config: Config) -> bool:
    if field == "train.batch_size" and config.data.source == "synthetic":
        return False  # whose sequences depend on it
    allowed = names(config.train.allow_changes)
    return field in CHANGEABLE and any(f"{field}.".startswith(f"{name}.") for name in allowed)


def require_same_data(saved: dict, now: dict, workdir: pathlib.Path) -> None:
    """Raise DataError with a diff if the same step would give other examples."""
    lines = differences(saved, now, "in the run", "now")
    if lines:
        raise DataError(
            f"Data differs from the run in {workdir}:\n"
            + "".join(f"  {line}\n" for line in lines)
            + "The same step would give other examples. Restore the shards and the tokenizer, "
            "or use another --workdir."
        )


def checkpoints_of(workdir: pathlib.Path) -> pathlib.Path:
    """Return the folder of a run's checkpoints. Raises CheckpointError if there is none."""
    folder = workdir.absolute() / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(
            f"{workdir} holds no {CHECKPOINTS} folder; is this a train.py --workdir?"
        )
    return folder


@contextlib.contextmanager
def new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a folder that becomes `output` once all of it is written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WorkdirError(f"{output} is not an empty folder. Nothing was written.")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except OSError as error:
        raise WorkdirError(f"{error}. Nothing was written to {output}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
