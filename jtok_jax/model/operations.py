# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which implementation of the table operations runs on a device, and why."""

from typing import NamedTuple

import jax.numpy as jnp
import jtok_kernels


class Operations(NamedTuple):
    """The implementation of the operations on tables, why, and how it wants them held."""

    name: str
    reason: str
    packed: bool  # bfloat16 tables as 32-bit words, see jtok_kernels/packing.py


def choose_operations(name: str, *, dtype: jnp.dtype, **tables) -> Operations:
    """Return which implementation a table gets on a device; `tables` as jtok_kernels.choose wants.

    Raises:
        ValueError: the one asked for cannot run here.
    """
    asked = None if name == "auto" else name
    if dtype == jnp.bfloat16 and name in ("auto", "mosaic_tpu") and held_alone():
        words = jtok_kernels.choose(asked, dtype=jnp.dtype("uint32"), **tables)
        if words.name.startswith("mosaic_tpu"):
            return Operations(words.name, f"{words.reason}; tables held as words", packed=True)
    return Operations(*jtok_kernels.choose(asked, dtype=dtype, **tables, local=True), packed=False)


def held_alone() -> bool:
    """Return whether tables are on one device; words split by column would be no whole entries."""
    return jtok_kernels.num_devices() == 1
