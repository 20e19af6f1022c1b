# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A file that one process holds: who trains in a workdir, who starts as which process."""

import contextlib
import fcntl
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import TextIO

from jtok_jax.errors import WorkdirError

LOCK_FILE = "lock"  # of a workdir


@contextlib.contextmanager
def locked(
    path: pathlib.Path, *, shared: bool = False, option: str = "--workdir"
) -> Iterator[TextIO]:
    """Hold `path` as the only process; the operating system lets go when the process ends.

    Args:
        shared: beside others who share it too.
        option: what takes another folder.

    Raises:
        WorkdirError: another process holds it, or the file system cannot write or lock it.
    """
    try:
        if not shared:
            path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("r" if shared else "a+")
    except OSError as error:
        raise WorkdirError(f"{path.parent} cannot be written: {error}.") from error
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise WorkdirError(
                f"{path} is in use by {file.read().strip() or 'another process'}. Nothing was "
                f"changed. Use another {option}, or stop that process first."
            ) from None
        except OSError as error:  # as of Lustre mounted without flock
            raise WorkdirError(
                f"{path} cannot be locked: {error}. Its file system must have flock; use a "
                f"{option} on another."
            ) from error
        if not shared:
            try:
                file.truncate(0)
                file.write(f"a process with pid {os.getpid()} on {platform.node()}\n")
                file.flush()
            except OSError as error:
                raise WorkdirError(f"{path} cannot be written: {error}.") from error
        yield file
