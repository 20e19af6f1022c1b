# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The constants of one operation."""

from typing import NamedTuple


class Form(NamedTuple):
    """How rows are normalised and how they enter the stream; static, so it may pick a program."""

    depth_scale: float | None  # 1/sqrt(2 N_l) of JTok-M's injection; None: JTok's gate
    norm: str  # one of reference.NORMS
    eps: float

    def share(self, dim: int) -> float:
        """Return each entry's share in n^2, the square of the norm that a row is divided by."""
        return {"l2": 1.0, "rms": 1.0 / dim}[self.norm]
