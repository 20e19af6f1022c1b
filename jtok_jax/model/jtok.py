# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok and JTok-M (arXiv 2602.00800) in a layer: routing, balance, and the token tables' part.

The equations on rows (norm, gate, mixing, injection: Eq. 7 to 9 and 11 to 13) are operations of
jtok_kernels, written out in jtok_kernels/reference.py; the router (Eq. 10) and the balance loss
are here. All arithmetic is float32. What the paper leaves open is an argument here and a field of
`JtokConfig`; docs/method.md lists the choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jtok_kernels
from flax import nnx
from jtok_kernels import RowPlan, reference

from jtok_jax.config import ModelConfig
from jtok_jax.errors import ConfigError
from jtok_jax.model.layers import normal, rms_norm

HEALTH_TOKENS = 256  # at most so many tokens, spread over the batch, stand for all in `health`


class Route(NamedTuple):
    """Which tables a token reads, with which weights."""

    choice: jax.Array  # int32 [..., k]
    weights: jax.Array  # float32 [..., k], sum 1
    probabilities: jax.Array  # float32 [..., M], sigmoid of every logit


def route(x_BTD: jax.Array, router_DM: jax.Array, bias_M: jax.Array | None, *, top_k: int) -> Route:
    """g = x^T R, Eq. 10, with x = RMSNorm(h); TopK and w_i = sigmoid(g_i) / sum_j sigmoid(g_j)."""
    logits_BTM = jnp.dot(x_BTD.astype(jnp.float32), router_DM, precision=jax.lax.Precision.HIGHEST)
    if bias_M is not None:
        logits_BTM = logits_BTM + bias_M
    chosen, choice = jax.lax.top_k(logits_BTM, top_k)
    weights = jax.nn.softmax(jax.nn.log_sigmoid(chosen), axis=-1)  # the same ratio, no 0/0
    return Route(choice, weights, jax.nn.sigmoid(logits_BTM))


def balance_loss(probabilities: jax.Array, choice: jax.Array, *, probability: str) -> jax.Array:
    """n_e * sum_i p_i f_i, App. B, without lambda; over all tokens given.

    p_i is the mean probability of table i, f_i its share of the choices (no gradient).

    Args:
        probability: "sigmoid" as it is, or "normalized" over the n_e tables (open).
    """
    num_tables = probabilities.shape[-1]
    if probability == "normalized":
        probabilities = probabilities / probabilities.sum(axis=-1, keepdims=True)
    mean_M = probabilities.reshape(-1, num_tables).mean(axis=0)
    return num_tables * jnp.sum(mean_M * load(choice, num_tables))


def load(choice: jax.Array, count: int) -> jax.Array:
    """Share of the choices that fell on each of `count` tables or experts; sums to 1."""
    return jnp.mean(jax.nn.one_hot(choice.reshape(-1), count, dtype=jnp.float32), axis=0)


class Lookup(NamedTuple):
    """What a layer needs to read its rows: the whole stack, never sliced, and its index."""

    tables: jax.Array  # JTok [G, V, D], JTok-M [G, M, V, D], or words (Operations.packed)
    layer: jax.Array  # int32 scalar, index into the stack
    ids_BT: jax.Array
    plan: RowPlan | None  # of the flattened ids; for training
    row_grads: jax.Array | None  # JTok [U, D], JTok-M [M, U, D]


class Operations(NamedTuple):
    """The implementation of the operations on tables, why, and how it wants them held."""

    name: str
    reason: str
    packed: bool  # bfloat16 tables as 32-bit words, see jtok_kernels/packing.py


def operations(config: ModelConfig) -> Operations:
    """Which implementation of the operations on tables this model uses here, and why.

    Raises:
        ConfigError: the one asked for cannot run here.
    """
    jtok, name = config.jtok, config.jtok.implementation
    if name.startswith("mosaic") and jax.device_count() > 1:
        raise ConfigError(
            f"model.jtok.implementation is {name!r}, whose kernels run on one device; there are "
            f"{jax.device_count()}. Use 'auto' or 'xla'."
        )
    tables = {"dim": config.model_dim, "dtype": jnp.dtype(jtok.table_dtype)}
    if jtok.kind == "jtok_m":
        tables |= {"num_tables": jtok.num_tables, "top_k": jtok.top_k}
    asked = None if name == "auto" else name
    try:
        if tables["dtype"] == jnp.bfloat16 and name in ("auto", "mosaic_tpu"):
            words = jtok_kernels.choose(asked, **tables | {"dtype": jnp.dtype("uint32")})
            if words.name.startswith("mosaic_tpu"):
                return Operations(words.name, f"{words.reason}; tables held as words", packed=True)
        return Operations(*jtok_kernels.choose(asked, **tables), packed=False)
    except ValueError as error:
        raise ConfigError(f"model.jtok.implementation: {error}") from error


class TokenTables(nnx.Module):
    """One layer's modulation: the scale s and, for JTok-M, the router; the tables are handed in."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, jtok = config.model_dim, config.jtok
        gated = jtok.kind == "jtok"
        start = jtok.gate_scale_init if gated else jtok.mixture_scale_init
        self.scale = nnx.Param(jnp.full(dim, start, jnp.float32))
        if not gated:
            self.router = normal(rngs, dim, jtok.num_tables, std=jtok.router_init_std)
            if jtok.router_bias:
                self.router_bias = nnx.Param(
                    jnp.full(jtok.num_tables, jtok.router_bias_init, jnp.float32)
                )
            if jtok.router_norm == "own":
                self.router_norm = nnx.Param(jnp.ones(dim, jnp.float32))
        self.config = config

    def __call__(
        self,
        tilde_BTD: jax.Array,
        dm_BTD: jax.Array,
        routed_by: tuple[jax.Array, jax.Array],
        lookup: Lookup,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """(h', balance loss, health) from h~, dm, and (stream, its norm) to route by."""
        config, jtok = self.config, self.config.jtok
        flat = lambda x: x.reshape(-1, x.shape[-1])
        h, dm, ids, scale = (
            flat(tilde_BTD),
            flat(dm_BTD),
            lookup.ids_BT.reshape(-1),
            self.scale[...],
        )
        form = {"norm": jtok.norm, "eps": jtok.eps}
        by = {"implementation": operations(config).name}
        rows = {name: getattr(lookup, name) for name in ("layer", "plan", "row_grads")}
        if jtok.kind == "jtok":
            out = jtok_kernels.jtok(h, dm, lookup.tables, ids, scale, **form, **rows, **by)
            balance, health = jnp.float32(0), _gate_health(scale, lookup, ids, form)
        else:
            routed = self.route(*routed_by)
            choice, weights = flat(routed.choice), flat(routed.weights)
            form |= {"depth_scale": (2 * config.num_layers) ** -0.5}
            out = jtok_kernels.jtok_m(
                h, dm, lookup.tables, ids, choice, weights, scale, **form, **rows, **by
            )
            balance = balance_loss(
                routed.probabilities, routed.choice, probability=jtok.balance_probability
            )
            health = _router_health(routed)
            health |= _injection_health(scale, dm, lookup, ids, choice, weights, form)
        return out.reshape(tilde_BTD.shape), balance, jax.lax.stop_gradient(health)

    def route(self, stream_BTD: jax.Array, normed_BTD: jax.Array) -> Route:
        """Route by the stream `h` or `h~`; `normed` is its norm shared with the backbone."""
        jtok, eps = self.config.jtok, self.config.norm_eps
        weight = self.router_norm[...] if jtok.router_norm == "own" else None
        shared = jtok.router_norm == "shared"
        x_BTD = normed_BTD if shared else rms_norm(stream_BTD, weight, eps=eps)
        bias = self.router_bias[...] if jtok.router_bias else None
        return route(x_BTD, self.router[...], bias, top_k=jtok.top_k)


def _gate_health(scale, lookup: Lookup, ids, form) -> dict[str, jax.Array]:
    rows = jtok_kernels.as_float(lookup.tables[lookup.layer, _some(ids)])
    return {"row_norm": _row_norm(rows), "gate_size": _rms(reference.gate(rows, scale, **form) - 1)}


def _injection_health(scale, dm, lookup: Lookup, ids, choice, weights, form):
    rows = lookup.tables[lookup.layer, _some(choice), _some(ids)[:, None]]
    rows = jtok_kernels.as_float(rows)
    dr = reference.injection(reference.mix(rows, _some(weights)), scale, **form)
    return {"row_norm": _row_norm(rows), "gate_size": _rms(dr) / _rms(_some(dm))}


def _router_health(routed: Route) -> dict[str, jax.Array]:
    p = routed.probabilities / routed.probabilities.sum(axis=-1, keepdims=True)
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, reference.TINY)), axis=-1)
    return {
        "router_entropy": jnp.mean(entropy),
        "router_load": load(routed.choice, p.shape[-1]),
    }


def _some(x: jax.Array) -> jax.Array:
    return x[:: -(-x.shape[0] // HEALTH_TOKENS)]


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def _row_norm(rows: jax.Array) -> jax.Array:
    return jnp.mean(jnp.linalg.norm(rows, axis=-1))
