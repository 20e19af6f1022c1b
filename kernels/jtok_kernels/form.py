# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The constants of one operation."""

from typing import NamedTuple


class Form(NamedTuple):
    """How rows are normalised and how they enter the stream; static, so it may pick a program."""

    depth_scale: float | None  # 1/sqrt(2 N_l) of JTok-M's injection; None: JTok's gate
    norm: str  # l2 | rms
    eps: float
