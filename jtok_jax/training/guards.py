# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What protects a run from outside: one writer per workdir, and an orderly stop on signals."""

import fcntl
import os
import pathlib
import signal
import socket

from jtok_jax.errors import WorkdirError

LOCK_FILE = "lock"


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
        self._file.truncate(0)
        self._file.write(f"a trainer with pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(self, *_):
        self._file.close()


class StopSignal:
    """Context that notes SIGTERM and Ctrl-C instead of dying; a second Ctrl-C raises."""

    name: str | None = None

    def __enter__(self):
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        os.write(2, f"\n{self.name}: saving after this step, then stopping.\n".encode())
