# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Heartbeats while processes connect: jax.distributed cannot say which one is missing.

Every process touches a file of its own once a second, in a folder that all share. The clock is that
of the file system. The file says who its process is and how it was launched.
"""

import contextlib
import os
import pathlib
import platform
import signal
import threading
import time
from collections.abc import Iterator

from jtok_jax.console import say
from jtok_jax.errors import HostError
from jtok_jax.launch import Launch
from jtok_jax.lock import locked

GRACE_SECONDS = 10  # a process silent for longer is not there
_GAVE_UP = "gave up\n"  # last line of who waited in vain: others name it as here all the same
_BEAT_SECONDS = 1.0


@contextlib.contextmanager
def heartbeat(launch: Launch, folder: pathlib.Path, seconds: float) -> Iterator[None]:
    """Beat while this process connects; after `seconds` say who is missing, and exit.

    Process 0 is waited for before the context is entered. Without it a connection would reach
    nobody, or another run that uses the same address.

    Raises:
        WorkdirError: `folder` cannot be written, or another process has the same rank.
    """
    node = platform.node()
    rank = f"unknown-{node}" if launch.process_id is None else str(launch.process_id)
    own, connected = folder / rank, threading.Event()
    until = time.monotonic() + seconds

    def beat() -> None:
        while not connected.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(own)
            if time.monotonic() > until:
                _exit_with_missing(launch, own, seconds)

    with locked(own) as file:
        print(launch, file=file, flush=True)
        say(f"[process {rank} on {node}] waiting for all, at most {seconds:g} s ({launch})")
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        # Python sees no signal while JAX connects: Ctrl-C has to end the process by itself.
        previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            while launch.process_id and not _beats(folder / "0", _time(own), 0.0):
                time.sleep(_BEAT_SECONDS / 4)
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
            connected.set()
            thread.join()
            own.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still in it
                folder.rmdir()


def _time(own: pathlib.Path) -> float:
    """Return the time of the file system that beats are compared with."""
    with contextlib.suppress(OSError):  # somebody has cleared the folder
        return own.stat().st_mtime
    return time.time()


def _beats(path: pathlib.Path, now: float, gave_up_seconds: float) -> bool:
    """Return whether a process beats, or gave up no longer ago than `gave_up_seconds`."""
    with contextlib.suppress(OSError):  # it has connected meanwhile, or has not started
        limit = gave_up_seconds if path.read_text().endswith(_GAVE_UP) else GRACE_SECONDS
        return now - path.stat().st_mtime < limit
    return False


def _present(own: pathlib.Path, seconds: float) -> dict[str, str]:
    """Return what the files of all processes say that beat or gave up, by rank."""
    found, now = {}, _time(own)
    for path in sorted(own.parent.iterdir()):
        if _beats(path, now, seconds):
            with contextlib.suppress(OSError):
                found[path.name] = ", ".join(path.read_text().splitlines())
    return found


def _exit_with_missing(launch: Launch, own: pathlib.Path, seconds: float) -> None:
    """Say who is missing, and exit; the file stays, for others who are about to do the same."""
    with contextlib.suppress(OSError), own.open("a") as file:
        file.write(_GAVE_UP)
    present = _present(own, seconds)
    missing = [str(x) for x in range(launch.num_processes or 0) if str(x) not in present]
    lines = "".join(f"\n  {rank}: {text}" for rank, text in present.items())
    text = (
        f"HostError: not all processes connected within {seconds:g} s (train.start_seconds). "
        f"Missing: process {', '.join(missing) or 'unknown'} (not started, or with a --workdir "
        f"that is not the folder {own.parent.parent} of this host). Here:{lines}\n"
        "Start them all alike, with one --workdir that all hosts share.\n"
    )
    os.write(2, text.encode())
    os._exit(HostError.exit_code)
