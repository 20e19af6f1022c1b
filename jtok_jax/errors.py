# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Errors a user can act on, each with the exit code of its kind.

Every message says what failed, where, what was expected and found, and what to do.
"""

import contextlib
import pathlib
import sys
from typing import NoReturn

from jtok_jax.console import say, silence


class JtokError(Exception):
    """A failure with a message for the user; `exit_code` is what the command returns."""

    exit_code = 1


class ConfigError(JtokError, ValueError):
    """The configuration is wrong: unknown key, wrong type, impossible value."""

    exit_code = 2


class WorkdirError(JtokError):
    """The workdir is in use by another trainer, or cannot be written."""

    exit_code = 3


class CheckpointError(JtokError):
    """A checkpoint is missing, damaged or does not fit this configuration."""

    exit_code = 4


class DamagedError(CheckpointError):
    """The checkpoint `folder` does not hold what was saved; `other` is the newest one beside it."""

    def __init__(self, message: str, folder: pathlib.Path, other: int | None):
        super().__init__(message)
        self.folder, self.other = folder, other


class DataError(JtokError, ValueError):
    """Text, tokenizer, shards or token ids are not what they must be."""

    exit_code = 5


class NonFiniteError(JtokError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_code = 6


STALL_EXIT_CODE = 7  # not an exception: the wait that stalls cannot be left, see guards.StallWatch


class HostError(JtokError):
    """Another process of the run is missing, has failed or has died."""

    exit_code = 8


class Preempted(JtokError):
    """SIGTERM or Ctrl-C: the state is saved, run the same command to go on."""

    exit_code = 42


@contextlib.contextmanager
def exit_on_error():
    """Turn a `JtokError`, Ctrl-C and a device's lack of memory into a message and an exit code."""
    try:
        yield
    except JtokError as error:
        _exit(error.exit_code, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        _exit(130, "Interrupted. The same command goes on from what was saved, if anything was.")
    except BrokenPipeError:  # as of `... | head`
        silence(sys.stdout)
        _exit(1, "Stopped: nothing reads the output any more.")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = (
            "A device has too little memory. python -m jtok_jax.plan says what takes it and what "
            "would fit: model.remat=full, model.loss_chunk, train.grad_accumulation, another mesh."
        )
        _exit(1, f"{str(error).splitlines()[0]}\n{advice}")


def _exit(code: int, message: str) -> NoReturn:
    say(message, sys.stderr)
    sys.exit(code)
