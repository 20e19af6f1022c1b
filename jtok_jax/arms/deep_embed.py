# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""DeepEmbed (RWKV-8, 2025): a vector by token id multiplies the feed-forward's output."""

import dataclasses

import jax

from jtok_jax.arms.parameter import Parameter, Params, Seen, Sizes


@dataclasses.dataclass(frozen=True)
class DeepEmbed:
    """dm' = dm * (1 + E[x]), E zero at first; JTok without norm and scale.

    Differs from RWKV-8: there the ones are part of E, which weight decay would turn off.
    """

    def layer_parameters(self, sizes: Sizes) -> dict[str, Parameter]:
        return {"table": Parameter("vD", (sizes.vocab, sizes.dim))}

    def increment(self, params: Params, dm_BTD: jax.Array, seen: Seen) -> jax.Array:
        return dm_BTD * (1 + params["table"][seen.ids_BT].astype(dm_BTD.dtype))
