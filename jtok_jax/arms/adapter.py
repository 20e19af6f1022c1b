# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A bottleneck adapter (arXiv 1902.00751) beside the feed-forward."""

import dataclasses

import jax

from jtok_jax.arms.parameter import Parameter, Params, Seen, Sizes, check


@dataclasses.dataclass(frozen=True)
class Adapter:
    """dm' = dm + gelu(x W) U, U zero at first."""

    width: int = 64
    init_std: float = 0.02

    def __post_init__(self):
        check(self, "adapter", "width")

    def layer_parameters(self, sizes: Sizes) -> dict[str, Parameter]:
        return {
            "down": Parameter("Da", (sizes.dim, self.width), std=self.init_std),
            "up": Parameter("aD", (self.width, sizes.dim)),
        }

    def increment(self, params: Params, dm_BTD: jax.Array, seen: Seen) -> jax.Array:
        dtype = dm_BTD.dtype
        hidden_BTa = jax.nn.gelu(seen.post_BTD @ params["down"].astype(dtype))
        return dm_BTD + hidden_BTa @ params["up"].astype(dtype)
