# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Protects a run: an orderly stop, an end to stalls and bad steps."""

import contextlib
import faulthandler
import math
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from jtok_jax.config import Config
from jtok_jax.data.loader import check_unique
from jtok_jax.errors import STALL_EXIT_CODE, NonFiniteError

STALL_FILE = "stall.txt"
WRITE_SECONDS = 10  # at most so long is spent on writing it


def require_sound(record: dict, config: Config, saved: Callable[[], int | None]) -> None:
    """Stop the run at a step that was not applied, or led where no step should have.

    Args:
        record: of `metrics.step_record`, or of the validation after it, or both together.
        saved: returns the newest checkpoint.

    Raises:
        DataError: there was no room for its different ids.
        NonFiniteError: it is the last of train.max_bad_steps steps that were not finite, or the
            run's last and its validation is not.
    """
    step, bad = record["step"], record.get("bad_in_row", 0)
    check_unique(record.get("unique_ids", 0), config, step)
    if bad >= config.train.max_bad_steps:
        raise NonFiniteError(
            f"Steps {step - bad + 1} to {step}: loss or gradient is not finite. No step of these "
            f"was applied and nothing was saved after them; last checkpoint: {saved()}. Lower the "
            f"learning rate, or look at batch {record['batch_hash']}."
        )
    if step == config.train.steps and not math.isfinite(record.get("val_loss", 0.0)):
        raise NonFiniteError(
            f"Step {step}, the last: the validation loss is not finite; last checkpoint: "
            f"{saved()}. Lower the learning rate."
        )


class StopSignal:
    """Context that notes SIGTERM and Ctrl-C instead of dying; a second Ctrl-C raises.

    Of several processes any one may get it: JAX's runtime, which then has the handler of SIGTERM,
    agrees on a step. A Python handler in its place would defeat that; Ctrl-C is passed on to it.
    """

    def __init__(self):
        self.name: str | None = None  # of the signal that came to this process
        self.agreed: str | None = None  # what `reached` has said, once it has
        self._calls, self._several, self._previous = 0, jax.distributed.is_initialized(), {}

    def __enter__(self):
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def reached(self) -> str | None:
        """Return what asks to stop, from one call on: the same call on all processes.

        All ask alike, after every step and every batch of a validation. JAX agrees on a number of
        calls, and but once; a signal that comes before the first makes it agree on 1.
        """
        self._calls += 1
        if self.agreed:
            return self.agreed
        if not self._several:
            self.agreed = self.name
        elif multihost_utils.reached_preemption_sync_point(self._calls):
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
            os.write(
                2, f"\n{self.name}: stopping once what is under way is done and saved.\n".encode()
            )
        if self._several:
            signal.raise_signal(signal.SIGTERM)


class StallWatch:
    """Ends the process with exit code 7 when one wait takes longer than `seconds` (0: never).

    A wait inside a device, a file system or another host cannot be interrupted from Python. A
    thread of its own writes the stacks of all threads to `file`, says what was awaited and exits.

    announce: gets the exit code and the reason, for other processes.
    """

    def __init__(
        self,
        file: pathlib.Path,
        seconds: float,
        announce: Callable[[int, str], None] = lambda code, reason: None,
    ):
        self._file, self._seconds, self._announce = file, seconds, announce

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Watch one wait, for `what`."""
        timer = threading.Timer(self._seconds, self._exit, [what])
        timer.daemon = True
        if self._seconds:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _exit(self, what: str) -> None:
        process = jax.process_index() if jax.distributed.is_initialized() else 0
        path = self._file.with_stem(f"{self._file.stem}-{process}") if process else self._file
        message = (
            f"Stall: no {what} within {self._seconds:g} s (train.stall_seconds). Stacks in {path}. "
            "Nothing was saved meanwhile; run the same command again."
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
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file)
