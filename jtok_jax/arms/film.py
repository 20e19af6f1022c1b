# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""FiLM (arXiv 1709.07871) from the hidden state: scale and shift of the feed-forward's output."""

import dataclasses

import jax

from jtok_jax.arms.parameter import Parameter, Params, Seen, Sizes, check


@dataclasses.dataclass(frozen=True)
class Film:
    """dm' = dm * (1 + c A) + c B with c = x W, all linear, through `rank` entries."""

    rank: int = 32
    init_std: float = 0.02

    def __post_init__(self):
        check(self, "film", "rank")

    def layer_parameters(self, sizes: Sizes) -> dict[str, Parameter]:
        into, out = (sizes.dim, self.rank), (self.rank, sizes.dim)
        return {
            "down": Parameter("Df", into, std=self.init_std),
            "gain": Parameter("fD", out),
            "shift": Parameter("fD", out),
        }

    def increment(self, params: Params, dm_BTD: jax.Array, seen: Seen) -> jax.Array:
        dtype = dm_BTD.dtype
        c_BTf = seen.post_BTD @ params["down"].astype(dtype)
        gain_BTD, shift_BTD = (c_BTf @ params[name].astype(dtype) for name in ("gain", "shift"))
        return dm_BTD * (1 + gain_BTD) + shift_BTD
