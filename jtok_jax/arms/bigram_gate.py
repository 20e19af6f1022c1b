# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok keyed by hashed bigrams instead of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jtok_kernels import reference

from jtok_jax.arms.hashing import bigram_rows
from jtok_jax.arms.parameter import Parameter, Params, Seen, Sizes, check


@dataclasses.dataclass(frozen=True)
class BigramGate:
    """Eq. 7 to 9 of arXiv 2602.00800 with the row E[hash(x_before, x)]."""

    rows_per_id: int = 1  # rows of a layer's table over those of the vocabulary
    norm: str = "rms"
    eps: float = 1e-6
    scale_init: float = 1.0
    init_std: float = 0.02

    def __post_init__(self):
        check(self, "bigram_gate", "rows_per_id")

    def layer_parameters(self, sizes: Sizes) -> dict[str, Parameter]:
        shape = self.rows_per_id * sizes.vocab, sizes.dim
        return {
            "table": Parameter("gD", shape, std=self.init_std),
            "scale": Parameter("D", (sizes.dim,), start=self.scale_init),
        }

    def increment(self, params: Params, dm_BTD: jax.Array, seen: Seen) -> jax.Array:
        table = params["table"]
        e_BTD = jnp.take(table, bigram_rows(seen.ids_BT, len(table)), axis=0).astype(jnp.float32)
        gate_BTD = reference.gate(e_BTD, params["scale"], norm=self.norm, eps=self.eps)
        return (dm_BTD.astype(jnp.float32) * gate_BTD).astype(dm_BTD.dtype)
