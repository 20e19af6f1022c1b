# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What protects a run: one writer per workdir, an orderly stop, an end to stalls and bad steps."""

import contextlib
import faulthandler
import fcntl
import math
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from jtok_jax.config import Config
from jtok_jax.data.loader import check_unique
from jtok_jax.errors import STALL_EXIT_CODE, NonFiniteError, WorkdirError

LOCK_FILE = "lock"
STALL_FILE = "stall.txt"
WRITE_SECONDS = 10  # at most so long is spent on writing it


class WorkdirLock:
    """Context in which this process is the only trainer of `workdir` on this machine.

    The operating system drops the lock with the process, so a killed run can restart at once.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir

    def __enter__(self):
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = (self._workdir / LOCK_FILE).open("a+")
        except OSError as error:
            raise WorkdirError(f"{self._workdir} cannot be written: {error}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise WorkdirError(
                f"{self._workdir} is in use by {holder}. Nothing was changed. Use another "
                "--workdir, or stop that run first."
            ) from None
        except OSError as error:  # as of Lustre mounted without flock
            self._file.close()
            raise WorkdirError(
                f"{self._workdir} cannot be locked: {error}. Its file system must have flock; use "
                "a --workdir on another."
            ) from error
        self._file.truncate(0)
        self._file.write(f"a trainer with pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(self, *_):
        self._file.close()


def require_sound(record: dict, config: Config, saved: Callable[[], int | None]) -> None:
    """Stop the run at a step that was not applied, or led where no step should have.

    Args:
        record: of `metrics.step_record`, and the validation after it if there was one.
        saved: the newest checkpoint.

    Raises:
        DataError: there was no room for its different ids.
        NonFiniteError: it is the last of train.max_bad_steps steps that were not finite, or the
            run's last and its validation is not.
    """
    step, bad = record["step"], record["bad_in_row"]
    check_unique(record.get("unique_ids", 0), config, step)
    if bad >= config.train.max_bad_steps:
        raise NonFiniteError(
            f"Steps {step - bad + 1} to {step}: loss or gradient is not finite. No step of these "
            f"was applied and nothing was saved after them; last checkpoint: {saved()}. Lower the "
            f"learning rate, or look at batch {record['batch_hash']}."
        )
    require_finite(step, record.get("val_loss", 0.0), config, saved)


def require_finite(step: int, val_loss: float, config: Config, saved: Callable) -> None:
    """Raise NonFiniteError if `step` is the run's last and the validation after it not finite."""
    if step == config.train.steps and not math.isfinite(val_loss):
        raise NonFiniteError(
            f"Step {step}, the last: the validation loss is not finite; last checkpoint: "
            f"{saved()}. Lower the learning rate."
        )


class StopSignal:
    """Context that notes SIGTERM and Ctrl-C instead of dying; a second Ctrl-C raises.

    Of several processes any one may get it: JAX's runtime, which then has the handler of SIGTERM,
    agrees on a step. A Python handler in its place would defeat that; Ctrl-C is passed on to it.
    """

    name: str | None = None  # of the signal that came to this process
    agreed: str | None = None  # what `reached` has said, once it has

    def __enter__(self):
        self._asked = 0
        self._several = jax.distributed.is_initialized()
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def reached(self) -> str | None:
        """What asks to stop, from one call on: the same call on all processes.

        All ask alike, after every step and every batch of a validation. JAX agrees on a number of
        calls, and but once; a signal that comes before the first makes it agree on 1.
        """
        self._asked += 1
        if self.agreed:
            return self.agreed
        if not self._several:
            self.agreed = self.name
        elif multihost_utils.reached_preemption_sync_point(self._asked):
            self.agreed = self.name or "SIGTERM on one of the hosts"
        return self.agreed

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # of a reader that has gone
            os.write(2, f"\n{self.name}: stopping; a step under way is saved first.\n".encode())
        if self._several:
            signal.raise_signal(signal.SIGTERM)


class StallWatch:
    """Ends the process with exit code 7 when one wait takes longer than `seconds` (0: never).

    A wait inside a device, a file system or another host cannot be interrupted from Python: a
    thread of its own writes the stacks of all threads to DIR/stall.txt, says what was awaited and
    exits. Nothing is saved; a restart goes on from the last checkpoint.

    announce: told the exit code and the reason, for other processes.
    after: what the message ends with.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        seconds: float,
        announce: Callable[[int, str], None] = lambda code, reason: None,
        *,
        file: str = STALL_FILE,
        after: str = "Nothing was saved; the same command goes on from the last checkpoint.",
    ):
        self._workdir, self._seconds, self._announce = workdir, seconds, announce
        self._file, self._after = pathlib.Path(file), after

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        if not self._seconds:
            yield
            return
        timer = threading.Timer(self._seconds, self._exit, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def within(self, what: str, wait: Callable[[], None]) -> None:
        with self.waiting_for(what):
            wait()

    def _exit(self, what: str) -> None:
        process = jax.process_index() if jax.distributed.is_initialized() else 0
        stem = f"{self._file.stem}-{process}" if process else self._file.stem
        path = self._workdir / f"{stem}{self._file.suffix}"
        message = (
            f"Stall: no {what} within {self._seconds:g} s (train.stall_seconds). Stacks in {path}. "
            f"{self._after}"
        )
        # The disk, or who reads our stderr, may be what stalls: leave in any case.
        writer = threading.Thread(target=self._write, args=[message, path], daemon=True)
        writer.start()
        writer.join(timeout=WRITE_SECONDS)
        os._exit(STALL_EXIT_CODE)

    def _write(self, message: str, path: pathlib.Path) -> None:
        os.write(2, f"{message}\n".encode())
        self._announce(STALL_EXIT_CODE, message)
        with path.open("w") as file:
            file.write(f"{message}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
