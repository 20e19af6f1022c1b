# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok-M in plain autodiff, with what ablations change.

The product's own sum with depth_scale 1 / sqrt(2 num_layers) and the product's norm and s.

Differs from the paper: no balance loss.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jtok_kernels import NORMS, mixed, reference

from jtok_jax.arms.parameter import Parameter, Params, Seen, Sizes, check
from jtok_jax.errors import ConfigError

ROUTERS = ("hidden", "before", "token", "random")
WEIGHTS = ("sigmoid", "softmax")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """dm' = dm + depth_scale * s * Norm(sum_i w_i E_i[x]), Eq. 10 to 13 of arXiv 2602.00800."""

    num_tables: int = 5
    top_k: int = 2
    # hidden: the layer's input | before: that of the layer before it, so that rows can be read a
    # layer ahead (the first layer's its own) | token: logits by id | random: fixed, by id
    router: str = "hidden"
    weights: str = "sigmoid"  # over their sum, or softmax of the chosen logits
    norm: str = "rms"  # l2 | rms | none
    eps: float = 1e-6
    depth_scale: float = 1.0  # of the paper: 1 / sqrt(2 num_layers)
    scale_init: float = 0.0
    init_std: float = 0.02
    router_init_std: float = 0.02

    def __post_init__(self):
        check(self, "mixture", "num_tables", "top_k", norms=(*NORMS, "none"))
        for name, known in (("router", ROUTERS), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"model.arms.mixture.{name} is {getattr(self, name)!r}; expected one of "
                    f"{', '.join(known)}."
                )
        if self.top_k > self.num_tables:
            raise ConfigError(
                f"model.arms.mixture.top_k (K) is {self.top_k}; num_tables (n_e) is "
                f"{self.num_tables}."
            )

    def layer_parameters(self, sizes: Sizes) -> dict[str, Parameter]:
        tables = self.num_tables, sizes.vocab, sizes.dim
        parameters = {
            "table": Parameter("mvD", tables, std=self.init_std),
            "scale": Parameter("D", (sizes.dim,), start=self.scale_init),
        }
        std = self.router_init_std
        if self.router in ("hidden", "before"):
            parameters["router"] = Parameter("Dm", (sizes.dim, self.num_tables), std=std)
        if self.router == "token":
            shape = sizes.vocab, self.num_tables
            parameters["router_by_token"] = Parameter("vm", shape, std=std, looked_up=True)
        return parameters

    def increment(self, params: Params, dm_BTD: jax.Array, seen: Seen) -> jax.Array:
        chosen, choice = jax.lax.top_k(self._logits(params, seen), self.top_k)
        logits = jax.nn.log_sigmoid(chosen) if self.weights == "sigmoid" else chosen
        weights_BTk = jax.nn.softmax(logits, axis=-1)
        rows_BTkD = params["table"][choice, seen.ids_BT[..., None]]
        e_BTD = reference.mix(rows_BTkD.astype(jnp.float32), weights_BTk)
        if self.norm != "none":
            e_BTD = reference.norm_eps(e_BTD, norm=self.norm, eps=self.eps)
        return dm_BTD + (self.depth_scale * params["scale"] * e_BTD).astype(dm_BTD.dtype)

    def _logits(self, params: Params, seen: Seen) -> jax.Array:
        """float32 [B, T, n_e]."""
        if self.router == "token":
            return params["router_by_token"][seen.ids_BT]
        if self.router == "random":  # a number in [0, 1) of every id and table
            places = jnp.arange(self.num_tables, dtype=jnp.uint32)
            words = mixed(seen.ids_BT[..., None].astype(jnp.uint32) + mixed(places))
            return words.astype(jnp.float32) * 2.0**-32
        highest = jax.lax.Precision.HIGHEST
        x_BTD = seen.before_BTD if self.router == "before" else seen.pre_BTD
        return jnp.dot(x_BTD.astype(jnp.float32), params["router"], precision=highest)
