# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What a run tells whoever looks on."""

import os
import sys
from typing import TextIO


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line to `stream` (stdout); where its reader has gone, nothing, then and later.

    Ctrl-C ends the tee of `train.py ... | tee log` first, and the run has yet to save.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Send what `stream` still holds, and what is yet to be printed to it, nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
