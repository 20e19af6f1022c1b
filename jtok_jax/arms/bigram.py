# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A hashed bigram table at the input: a vector by the last two ids, added to the embedding."""

import dataclasses

import jax
import jax.numpy as jnp

from jtok_jax.arms.hashing import bigram_rows
from jtok_jax.arms.parameter import Parameter, Params, Sizes, check


@dataclasses.dataclass(frozen=True)
class Bigram:
    """h0 = embed[x] + E[hash(x_before, x)]; starts at zero."""

    rows_per_id: int = 4  # rows of the table over those of the vocabulary

    def __post_init__(self):
        check(self, "bigram", "rows_per_id")

    def parameters(self, sizes: Sizes) -> dict[str, Parameter]:
        return {"table": Parameter("bD", (self.rows_per_id * sizes.vocab, sizes.dim))}

    def embed(self, params: Params, h_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        table = params["table"]
        rows_BTD = jnp.take(table, bigram_rows(ids_BT, len(table)), axis=0)
        return h_BTD + rows_BTD.astype(h_BTD.dtype)
