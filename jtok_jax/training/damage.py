# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tells a damaged checkpoint from a disk or a device that fails, and says so in a line."""

import contextlib
import json
import logging
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
from orbax.checkpoint import v1 as ocp

from jtok_jax.errors import CheckpointError, DamagedError, WorkdirError

REMOVED_SECONDS = 0.5  # what it may take to remove one
METADATA, METRICS = "_CHECKPOINT_METADATA", "metrics/metrics"  # Orbax's files of a checkpoint


@contextlib.contextmanager
def reading(folder: pathlib.Path, step: int) -> Iterator[None]:
    """Raise DamagedError where the checkpoint of `step` is damaged; CheckpointError: its disk is.

    Orbax is silent meanwhile: it logs a traceback per leaf, and the error says it once.
    """
    logging.disable(logging.CRITICAL)
    silence_leftovers()
    try:
        yield
    except WorkdirError:  # of what is filled with it
        raise
    except Exception as error:
        root = _root(error)
        if isinstance(root, jax.errors.JaxRuntimeError):  # of a device, such as its memory
            raise root from None
        if _is_removed(folder / str(step), root):
            raise CheckpointError(
                f"Checkpoint {folder / str(step)} was removed while it was read: the run keeps "
                "those that checkpoint.keep and its like say. Read another."
            ) from root
        if not _is_damage(root):
            raise CheckpointError(
                f"Checkpoint {folder / str(step)} cannot be read: {_line(root)}. It may be sound: "
                "mend the disk or the rights of the folder, then run the same command."
            ) from root
        other = max((one for one in steps_of(folder) if one != step), default=None)
        there = "step 0: there is no checkpoint before it" if other is None else f"step {other}"
        raise DamagedError(
            f"Checkpoint {folder / str(step)} is damaged: {_line(root)}. Move that folder away "
            f"to go on from {there}.",
            folder / str(step),
            other,
        ) from root
    finally:
        logging.disable(logging.NOTSET)


def _root(error: BaseException) -> BaseException:
    """Return the error that came first: Orbax wraps it in pages of its options."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return _root(earlier) if earlier else error


def silence_leftovers() -> None:
    """Print nothing of the coroutines and tasks that a failed read or save of Orbax leaves.

    They are told when Python frees them, which may be long after it ended.
    """
    logging.getLogger("asyncio").addFilter(_is_no_leftover)  # the same one twice counts once
    before = sys.unraisablehook
    if before is not _without_coroutines:
        _without_coroutines.before = before
        sys.unraisablehook = _without_coroutines


def _without_coroutines(unraisable) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in code.co_filename
    if not of_orbax and "Event loop is closed" not in str(unraisable.exc_value):
        _without_coroutines.before(unraisable)


def _is_no_leftover(record: logging.LogRecord) -> bool:
    of_tensorstore = record.exc_info and "zarr" in str(record.exc_info[1])
    return not (of_tensorstore and "never retrieved" in record.getMessage())


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(" .:[")


def _is_removed(path: pathlib.Path, error: BaseException) -> bool:
    """Return whether a checkpoint goes, file by file, rather than lacks one."""
    missing = isinstance(error, FileNotFoundError) or "NOT_FOUND" in str(error)
    if missing and path.exists():
        time.sleep(REMOVED_SECONDS)
    return not path.exists()


def _is_damage(error: BaseException) -> bool:
    """Return whether bytes were read, or missing, that are not those of a checkpoint."""
    if "os_error_code" in str(error):  # of TensorStore, whose errors are all ValueErrors
        return "NOT_FOUND" in str(error)
    return isinstance(error, ValueError | KeyError | TypeError | EOFError | FileNotFoundError)


def steps_of(folder: pathlib.Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, whether they are sound or not."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def open_checkpointer(folder: pathlib.Path, **options) -> ocp.training.Checkpointer:
    """Return Orbax's checkpointer, which reads metadata and metrics of all checkpoints.

    Raises:
        DamagedError: that of one is no JSON.
    """
    for step in steps_of(folder):
        paths = [folder / str(step) / METADATA, folder / str(step) / METRICS]
        for path in paths:
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # or removed meanwhile
                continue
            with reading(folder, step):
                json.loads(content)
    return ocp.training.Checkpointer(folder, **options)
