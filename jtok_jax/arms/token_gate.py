# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok's gate in plain autodiff, to stand beside JTok-M in one layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jtok_kernels import reference

from jtok_jax.arms.parameter import Parameter, Params, Seen, Sizes, check


@dataclasses.dataclass(frozen=True)
class TokenGate:
    """Eq. 7 to 9 of arXiv 2602.00800; the gated increment is what other arms see."""

    norm: str = "rms"
    eps: float = 1e-6
    scale_init: float = 1.0
    init_std: float = 0.02

    def __post_init__(self):
        check(self, "token_gate")

    def layer_parameters(self, sizes: Sizes) -> dict[str, Parameter]:
        return {
            "table": Parameter("vD", (sizes.vocab, sizes.dim), std=self.init_std),
            "scale": Parameter("D", (sizes.dim,), start=self.scale_init),
        }

    def increment(self, params: Params, dm_BTD: jax.Array, seen: Seen) -> jax.Array:
        e_BTD = params["table"][seen.ids_BT].astype(jnp.float32)
        gate_BTD = reference.gate(e_BTD, params["scale"], norm=self.norm, eps=self.eps)
        return (dm_BTD.astype(jnp.float32) * gate_BTD).astype(dm_BTD.dtype)
