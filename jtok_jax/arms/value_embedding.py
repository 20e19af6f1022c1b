# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Value embeddings: a vector by token id, added to the values of attention in every layer.

Zhou et al. 2024 (arXiv 2410.17897) take the first layer's values; a table of its own for a layer is
what the speed runs of nanoGPT made of it, with learned weights of both that are left out here.
"""

import dataclasses

import jax

from jtok_jax.arms.parameter import Parameter, Params, Sizes, check


@dataclasses.dataclass(frozen=True)
class ValueEmbedding:
    """v' = v + E[x]."""

    init_std: float = 0.02

    def __post_init__(self):
        check(self, "value_embedding")

    def layer_parameters(self, sizes: Sizes) -> dict[str, Parameter]:
        shape = sizes.vocab, sizes.kv_heads, sizes.head_dim
        return {"table": Parameter("vKH", shape, std=self.init_std)}

    def values(self, params: Params, value_BTKH: jax.Array, ids_BT: jax.Array) -> jax.Array:
        return value_BTKH + params["table"][ids_BT].astype(value_BTKH.dtype)
