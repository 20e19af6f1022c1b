# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Who is here while processes connect: jax.distributed cannot say who is missing.

Every process touches a file of its own in a folder that all share, once a second: the clock is that
of the file system, and nothing needs to be connected. A file holds how its process was launched.
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

GRACE_SECONDS = 10  # a process silent for longer is not there
_BEAT_SECONDS = 1.0
_GAVE_UP = "gave up: "


@contextlib.contextmanager
def roll_call(launch: Launch, folder: pathlib.Path, seconds: float) -> Iterator[None]:
    """Context of connecting, which cannot be interrupted: in the end say who is not here, and exit.

    Process 0 is waited for before the context is entered: without it a connection would reach
    nobody, or another run that uses the same address.

    Raises:
        HostError: the folder cannot be written, or another process has the same rank.
    """
    rank = "unknown" if launch.process_id is None else str(launch.process_id)
    own = folder / f"{rank}-{platform.node()}-{os.getpid()}"
    connected, until = threading.Event(), time.monotonic() + seconds
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_alone(folder, rank)
        own.write_text(str(launch))
    except OSError as error:
        raise HostError(f"{folder} cannot be written: {error}.") from error

    def show() -> None:
        while not connected.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                own.touch()
            if time.monotonic() > until:
                _give_up(launch, own, seconds)

    text = f"waiting for all, at most {seconds:g} s ({launch})"
    say(f"[process {rank} on {platform.node()}] {text}")
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    # Python sees no signal while JAX connects: Ctrl-C has to end the process by itself.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        while rank not in ("0", "unknown") and not _here(own, "0"):
            time.sleep(_BEAT_SECONDS / 4)
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        connected.set()
        thread.join()
        own.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still in it
            folder.rmdir()


def _require_alone(folder: pathlib.Path, rank: str) -> None:
    """Remove what processes of this rank left behind; refuse if one of them is alive."""
    before = {path: _modified(path) for path in folder.glob(f"{rank}-*")}
    if not before or rank == "unknown":
        return
    time.sleep(2.5 * _BEAT_SECONDS)
    for path, modified in before.items():
        if path.exists() and _modified(path) != modified:
            raise HostError(
                f"There are two processes {rank}: {path.name} waits for the others too. Give each "
                "process of a run its own --process_id, and another run another --workdir."
            )
        path.unlink(missing_ok=True)


def _here(own: pathlib.Path, rank: str = "*", gave_up: float = 0.0) -> dict[str, str]:
    """How each process that is here was launched, also who gave up at most so many seconds ago."""
    found, now = {}, _modified(own)
    for path in sorted(own.parent.glob(f"{rank}-*")):
        with contextlib.suppress(OSError):
            text, age = path.read_text(), now - path.stat().st_mtime
            if age < (gave_up if text.startswith(_GAVE_UP) else GRACE_SECONDS):
                found[path.name] = text.removeprefix(_GAVE_UP)
    return found


def _modified(path: pathlib.Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _give_up(launch: Launch, own: pathlib.Path, seconds: float) -> None:
    """Say who is missing, and exit; the file stays, for others who are about to do the same."""
    here = _here(own, gave_up=seconds)
    ranks = {name.split("-")[0] for name in here}
    missing = [str(x) for x in range(launch.num_processes or 0) if str(x) not in ranks]
    if missing:
        text = (
            f"Missing: process {', '.join(missing)} (not started, or with a --workdir that is not "
            f"the folder {own.parent.parent} of this host); here: {', '.join(here)}. Start them "
            f"all, with one --workdir that all hosts share ({launch})"
        )
    else:
        lines = "".join(f"\n  {name}: {how}" for name, how in here.items())
        text = f"All are here but do not connect; compare how they were launched:{lines}"
    text = f"not all processes connected within {seconds:g} s (train.start_seconds). {text}"
    os.write(2, f"HostError: {text}\n".encode())
    with contextlib.suppress(OSError):
        own.write_text(f"{_GAVE_UP}{launch}")
    os._exit(HostError.exit_code)
