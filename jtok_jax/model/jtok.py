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
from jtok_kernels import reference

from jtok_jax.errors import ConfigError
from jtok_jax.model.layers import rms_norm
from jtok_jax.model.tables import Lookup
from jtok_jax.model.variables import Vector, normal, ones
from jtok_jax.model_config import ModelConfig

FEW = 16  # tables whose largest logits are found by counting
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
    chosen, choice = largest(logits_BTM, top_k)
    weights = jax.nn.softmax(jax.nn.log_sigmoid(chosen), axis=-1)  # the same ratio, no 0/0
    return Route(choice, weights, jax.nn.sigmoid(logits_BTM))


def largest(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the largest `count` values of the last axis and their places, as `lax.top_k` does.

    Of few values each one's rank is counted, which fuses into one kernel where a sort takes two.
    NaN counts as the largest, so that places differ whatever the values are.
    """
    size = values.shape[-1]
    if size > FEW:
        return jax.lax.top_k(values, count)
    place = jnp.arange(size, dtype=jnp.int32)
    rank, nan = jnp.zeros(values.shape, jnp.int32), jnp.isnan(values)
    for other in range(size):
        value, is_nan = values[..., other : other + 1], nan[..., other : other + 1]
        equal = (value == values) | (is_nan & nan)
        rank += (value > values) | (is_nan & ~nan) | (equal & (other < place))
    taken = [rank == k for k in range(count)]
    chosen = [jnp.sum(jnp.where(which, values, 0), axis=-1) for which in taken]
    places = [jnp.sum(jnp.where(which, place, 0), axis=-1) for which in taken]
    return jnp.stack(chosen, axis=-1), jnp.stack(places, axis=-1)


def balance_loss(probabilities: jax.Array, choice: jax.Array, *, probability: str) -> jax.Array:
    """n_e * sum_i p_i f_i, App. B, without lambda; over all tokens given.

    p_i is the mean probability of table i, f_i its share of the choices (no gradient).

    Args:
        probability: "sigmoid" as it is, or "normalized" over the n_e tables (open).
    """
    num_tables = probabilities.shape[-1]
    total = {"sigmoid": 1.0, "normalized": probabilities.sum(axis=-1, keepdims=True)}[probability]
    probabilities = probabilities / total
    mean_M = probabilities.reshape(-1, num_tables).mean(axis=0)
    return num_tables * jnp.sum(mean_M * load(choice, num_tables))


def load(choice: jax.Array, count: int) -> jax.Array:
    """Share of the choices that fell on each of `count` tables or experts; sums to 1."""
    return jnp.mean(jax.nn.one_hot(choice.reshape(-1), count, dtype=jnp.float32), axis=0)


class Ahead(NamedTuple):
    """What is known of a layer's rows before its feed-forward is done."""

    routed: Route | None  # JTok-M
    e_BTD: jax.Array | None  # rows or mixtures, where they come from other devices


class Operations(NamedTuple):
    """The implementation of the operations on tables, why, and how it wants them held."""

    name: str
    reason: str
    packed: bool  # bfloat16 tables as 32-bit words, see jtok_kernels/packing.py


def operations(config: ModelConfig, *, column_shards: int = 1) -> Operations:
    """Which implementation of the operations on tables this model uses on a device, and why.

    Raises:
        ConfigError: the one asked for cannot run here.
    """
    jtok = config.jtok
    tables = {"dim": config.model_dim // column_shards, "dtype": jnp.dtype(jtok.table_dtype)}
    if jtok.kind == "jtok_m":
        tables |= {"num_tables": jtok.num_tables, "top_k": jtok.top_k}
    try:
        return choose_operations(jtok.implementation, **tables)
    except ValueError as error:
        raise ConfigError(f"model.jtok.implementation: {error}") from error


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
    """Whether tables are on one device; words split by column would be no whole entries."""
    return jtok_kernels.num_devices() == 1


class TokenTables(nnx.Module):
    """One layer's modulation: the scale s and, for JTok-M, the router; the tables are handed in."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, jtok = config.model_dim, config.jtok
        gated = jtok.kind == "jtok"
        start = jtok.gate_scale_init if gated else jtok.mixture_scale_init
        self.scale = Vector(jnp.full(dim, start, jnp.float32), "D")
        if not gated:
            count, layers = jtok.num_tables, config.num_layers
            carrying = {"share": (len(jtok.table_layers(layers)), layers), "full_precision": True}
            std = jtok.router_init_std
            self.router = normal(rngs, dim, count, axes="DM", std=std, **carrying)
            if jtok.router_bias:
                bias = jnp.full(count, jtok.router_bias_init, jnp.float32)
                self.router_bias = Vector(bias, "M")
            if jtok.router_norm == "own":
                self.router_norm = ones(dim, "D")
        self.config = config

    @property
    def before_attention(self) -> bool:
        """Whether a layer's input alone says which rows its tokens use."""
        jtok = self.config.jtok
        return jtok.kind == "jtok" or jtok.router_input == "pre_attention"

    def ahead(self, stream_BTD: jax.Array, normed_BTD: jax.Array, lookup: Lookup) -> Ahead:
        """Route by the stream `h` or `h~`, whose norm is shared with the backbone, and send for
        rows that lie elsewhere: in time for what does not depend on them to hide the way.
        """
        routed = None if self.config.jtok.kind == "jtok" else self.route(stream_BTD, normed_BTD)
        if lookup.exchange is None:
            return Ahead(routed, None)
        by = (routed.choice, routed.weights) if routed else (None, None)
        return Ahead(routed, lookup.rows(*by))

    def __call__(
        self, tilde_BTD: jax.Array, dm_BTD: jax.Array, ahead: Ahead, lookup: Lookup
    ) -> tuple[jax.Array, jax.Array]:
        """Return h' and the balance loss from h~ and dm."""
        jtok, scale, routed, form = self.config.jtok, self.scale[...], ahead.routed, self._form
        if lookup.exchange:  # else the norm, which is all that uses e alone, waits for e at once
            dm_BTD, e_BTD = jax.lax.optimization_barrier((dm_BTD, ahead.e_BTD))
            ahead = ahead._replace(e_BTD=e_BTD)
            out = lookup.exchange.add(tilde_BTD, dm_BTD, ahead.e_BTD, scale, **form)
        else:
            out = self._modulate(tilde_BTD, dm_BTD, routed, lookup, form)
        if routed is None:
            return out, jnp.float32(0)
        probability = jtok.balance_probability
        return out, balance_loss(routed.probabilities, routed.choice, probability=probability)

    @property
    def _form(self) -> dict[str, object]:
        """How rows are normalised and enter the stream: options of the operations."""
        jtok, gated = self.config.jtok, self.config.jtok.kind == "jtok"
        depth_scale = None if gated else (2 * self.config.num_layers) ** -0.5
        return {"norm": jtok.norm, "eps": jtok.eps, "depth_scale": depth_scale}

    def health(self, dm_BTD: jax.Array, ahead: Ahead, lookup: Lookup) -> dict[str, jax.Array]:
        """Return the size of rows and gates of some tokens, and the router's of all, by name."""
        e, scale, form = _some_rows(ahead, lookup), self.scale[...], self._form
        found = {"row_norm": jnp.mean(jnp.linalg.norm(e, axis=-1))}
        if ahead.routed is None:
            gate = reference.gate(e, scale, norm=form["norm"], eps=form["eps"])
            return found | {"gate_size": _rms(gate - 1)}
        added = _rms(reference.injection(e, scale, **form))
        found["gate_size"] = added / _rms(_some(_flat(dm_BTD)))
        return found | _router_health(ahead.routed)

    def _modulate(self, tilde_BTD, dm_BTD, routed: Route | None, lookup: Lookup, form):
        """All of it on one device."""
        stream = _flat(tilde_BTD), _flat(dm_BTD), lookup.tables, lookup.ids.reshape(-1)
        options = {name: getattr(lookup, name) for name in ("layer", "plan", "row_grads")}
        options |= {"implementation": operations(self.config).name, **form}
        if routed is None:
            options.pop("depth_scale")
            out = jtok_kernels.jtok(*stream, self.scale[...], **options)
        else:
            choice, weights = _flat(routed.choice), _flat(routed.weights)
            out = jtok_kernels.jtok_m(*stream, choice, weights, self.scale[...], **options)
        return out.reshape(tilde_BTD.shape)

    def route(self, stream_BTD: jax.Array, normed_BTD: jax.Array) -> Route:
        """Route by the stream `h` or `h~`; `normed` is its norm shared with the backbone."""
        jtok, eps = self.config.jtok, self.config.norm_eps
        weight = self.router_norm[...] if jtok.router_norm == "own" else None
        shared = jtok.router_norm == "shared"
        x_BTD = normed_BTD if shared else rms_norm(stream_BTD, weight, eps=eps)
        bias = self.router_bias[...] if jtok.router_bias else None
        return route(x_BTD, self.router[...], bias, top_k=jtok.top_k)


def _some_rows(ahead: Ahead, lookup: Lookup) -> jax.Array:
    """Rows, or mixtures of them, of some tokens; float32 [N, D]."""
    if ahead.e_BTD is not None:
        return _some(_flat(ahead.e_BTD)).astype(jnp.float32)
    ids, routed = _some(lookup.ids.reshape(-1)), ahead.routed
    if routed is None:
        return jtok_kernels.as_float(lookup.tables[lookup.layer, ids])
    rows = lookup.tables[lookup.layer, _some(_flat(routed.choice)), ids[:, None]]
    return reference.mix(jtok_kernels.as_float(rows), _some(_flat(routed.weights)))


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


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])
