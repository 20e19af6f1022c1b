# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok and JTok-M (arXiv 2602.00800): modules for a block of this project or of your own.

The equations on rows (norm, gate, mixing, injection: Eq. 7 to 9 and 11 to 13) are operations of
jtok_kernels, written out in jtok_kernels/reference.py; Eq. 10 and App. B are in routing.py. All
arithmetic is float32. What the paper leaves open is an argument here and a field of `JtokConfig`;
docs/method.md lists the choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jtok_kernels
from flax import nnx
from jtok_kernels import RowPlan, reference

from jtok_jax.arms_config import NORMS
from jtok_jax.checks import one_of
from jtok_jax.errors import ConfigError
from jtok_jax.model.layers import rms_norm
from jtok_jax.model.routing import Route, balance_loss, load, route
from jtok_jax.model.tables import Lookup
from jtok_jax.model.variables import Table, Vector, normal, ones
from jtok_jax.model_config import DTYPES, PROBABILITIES, ROUTER_NORMS, ModelConfig

HEALTH_TOKENS = 256  # at most so many tokens, spread over the batch, stand for all in `health`


class Prefetched(NamedTuple):
    """Holds what is known of a layer's rows before its feed-forward is done."""

    routed: Route | None  # JTok-M
    rows_BTD: jax.Array | None  # rows or mixtures, where they come from other devices


class _TableLayer(nnx.Module):
    """The part that JTok and JTok-M share: the scale s, the form of their equations, a table."""

    depth_scale: float | None = None

    def __init__(self, num_rows: int | None, dim: int, *, scale_init, norm, eps, implementation):
        one_of(norm, "norm", NORMS)
        if dim < 1 or (num_rows is not None and num_rows < 1):
            raise ConfigError(f"A table of {num_rows} rows of {dim} is none; expected at least 1.")
        self.scale = Vector(jnp.full(dim, scale_init, jnp.float32), "D")
        self.norm, self.eps, self.implementation = norm, eps, implementation

    def lookup(
        self,
        ids: jax.Array,
        table: jax.Array | None = None,
        *,
        plan: RowPlan | None = None,
        row_grads: jax.Array | None = None,
    ) -> Lookup:
        """Return what a call reads rows by.

        Args:
            ids: int32 [B, T] in [0, num_rows); not checked.
            table: to read; None: the module's own.
            plan, row_grads: of `jtok_kernels.row_plan`, for gradients by unique row; see
                `jtok_kernels.jtok`. Without them the table gets a dense gradient.
        """
        table = self.table[...] if table is None else table
        return Lookup(table, None, ids, plan, row_grads)

    def prefetch(self, x_BTD: jax.Array | None, lookup: Lookup) -> Prefetched:
        """Route by `x`, and send for rows that lie elsewhere.

        Early enough, what does not depend on them hides the way.
        """
        routed = self.route(x_BTD)
        if lookup.exchange is None:
            return Prefetched(routed, None)
        return Prefetched(routed, lookup.rows(*routed[:2] if routed else ()))

    def route(self, x_BTD: jax.Array | None) -> Route | None:
        """Return which tables each token reads; None where there is one."""
        return None

    def health(
        self, delta_BTD: jax.Array, prefetched: Prefetched, lookup: Lookup
    ) -> dict[str, jax.Array]:
        """Return the size of rows and gates of some tokens, and the router's of all, by name."""
        e, scale, routed = _some_rows(prefetched, lookup), self.scale[...], prefetched.routed
        found = {"row_norm": jnp.mean(jnp.linalg.norm(e, axis=-1))}
        if routed is None:
            gate = reference.gate(e, scale, norm=self.norm, eps=self.eps)
            return found | {"gate_size": _rms(gate - 1)}
        added = _rms(reference.injection(e, scale, **self._form))
        found["gate_size"] = added / _rms(_some(_flat(delta_BTD)))
        return found | _router_health(routed)

    @property
    def _form(self) -> dict[str, object]:
        return {"norm": self.norm, "eps": self.eps, "depth_scale": self.depth_scale}

    def _options(self, lookup: Lookup) -> dict[str, object]:
        """Return the keyword arguments of the fused operations."""
        options = {name: getattr(lookup, name) for name in ("layer", "plan", "row_grads")}
        return options | {"implementation": self.implementation, "norm": self.norm, "eps": self.eps}

    def _add_fetched(self, h_BTD, delta_BTD, lookup: Lookup, prefetched: Prefetched) -> jax.Array:
        """Return h' where the rows lay on other devices."""
        # Else the norm, which is all that uses e alone, waits for e at once.
        delta_BTD, e_BTD = jax.lax.optimization_barrier((delta_BTD, prefetched.rows_BTD))
        return lookup.exchange.add(h_BTD, delta_BTD, e_BTD, self.scale[...], **self._form)


class JTok(_TableLayer):
    """Gates a feed-forward's increment by one row a token: h + delta (1 + s Norm(E[ids])).

    arXiv 2602.00800, Eq. 7 to 9. In a block of your own: `h = jtok(h, delta, ids)`, where h is the
    stream after attention and delta the output of the feed-forward.
    """

    def __init__(
        self,
        num_rows: int | None,
        dim: int,
        *,
        norm: str = "rms",
        eps: float = 1e-6,
        scale_init: float = 1.0,
        table_init_std: float = 0.02,
        table_dtype: str = "float32",
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Make the scale, and a table [num_rows, dim].

        Args:
            num_rows: of the table, V; None: no table, each call gets a lookup.
            norm: "rms" or "l2".
            implementation: of the kernels, see `jtok_kernels.choose`; None: by the device.

        Raises ConfigError: an argument is not possible.
        """
        super().__init__(
            num_rows, dim, scale_init=scale_init, norm=norm, eps=eps, implementation=implementation
        )
        if num_rows is not None:
            self.table = _own_table(rngs, num_rows, dim, std=table_init_std, dtype=table_dtype)

    def __call__(
        self,
        h_BTD: jax.Array,
        delta_BTD: jax.Array,
        ids_BT: jax.Array | None = None,
        *,
        lookup: Lookup | None = None,
        prefetched: Prefetched | None = None,
    ) -> jax.Array:
        """Return h', [B, T, D] in the dtype of `h`.

        Args:
            ids_BT: int32; not read where a `lookup` is given, such as that of `self.lookup`.
            prefetched: of `prefetch`.
        """
        lookup = lookup or self.lookup(_one_a_vector(ids_BT, h_BTD))
        if lookup.exchange:
            prefetched = prefetched or self.prefetch(None, lookup)
            return self._add_fetched(h_BTD, delta_BTD, lookup, prefetched)
        return jtok_kernels.jtok(
            _flat(h_BTD), _flat(delta_BTD), lookup.tables, lookup.ids.reshape(-1),
            self.scale[...], **self._options(lookup),
        ).reshape(h_BTD.shape)  # fmt: skip


class JTokM(_TableLayer):
    """Adds a routed mixture of rows: h + delta + s Norm(sum_i w_i E_i[ids]) / sqrt(2 N_l).

    arXiv 2602.00800, Eq. 10 to 13 and App. B. In a block of your own:
    `h, balance = jtok_m(h, x, delta, ids)`, where x is the normed input of the block, by which the
    router chooses. Add 1e-4 times the balance of all layers to the loss.
    """

    def __init__(
        self,
        num_rows: int | None,
        dim: int,
        *,
        num_layers: int,
        num_tables: int = 5,
        top_k: int = 2,
        norm: str = "rms",
        eps: float = 1e-6,
        scale_init: float = 0.1,
        table_init_std: float = 0.02,
        table_dtype: str = "float32",
        router_init_std: float = 0.02,
        router_norm: str = "shared",
        router_norm_eps: float = 1e-6,
        router_bias_init: float | None = None,
        router_share: tuple[int, int] = (1, 1),
        balance_probability: str = "sigmoid",
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Make scale and router, and tables [num_tables, num_rows, dim].

        Args:
            num_layers: N_l of Eq. 12, all layers of the model.
            router_norm: of `x` before the router: "shared" none, "own" with a weight, "weightless".
            router_bias_init: first value of the router's bias; None: it has none.
            router_share: (n, m): n of m layers use their router, for counts.
            others: as of `JTok`.
        """
        super().__init__(
            num_rows, dim, scale_init=scale_init, norm=norm, eps=eps, implementation=implementation
        )
        one_of(router_norm, "router_norm", ROUTER_NORMS)
        one_of(balance_probability, "balance_probability", PROBABILITIES)
        if num_layers < 1 or not 1 <= top_k <= num_tables:
            raise ConfigError(
                f"num_layers is {num_layers}, top_k {top_k} of {num_tables} tables; expected at "
                "least 1, and top_k at most num_tables."
            )
        options = {"axes": "DM", "share": router_share, "full_precision": True}
        self.router = normal(rngs, dim, num_tables, std=router_init_std, **options)
        if router_bias_init is not None:
            self.router_bias = Vector(jnp.full(num_tables, router_bias_init, jnp.float32), "M")
        if router_norm == "own":
            self.router_norm = ones(dim, "D")
        if num_rows is not None:
            self.table = _own_table(
                rngs, num_tables, num_rows, dim, std=table_init_std, dtype=table_dtype
            )
        self.normed, self.top_k, self.depth_scale = router_norm, top_k, (2 * num_layers) ** -0.5
        self.balance_probability, self.router_norm_eps = balance_probability, router_norm_eps

    def __call__(
        self,
        h_BTD: jax.Array,
        x_BTD: jax.Array | None,
        delta_BTD: jax.Array,
        ids_BT: jax.Array | None = None,
        *,
        lookup: Lookup | None = None,
        prefetched: Prefetched | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return h', [B, T, D] in the dtype of `h`, and the balance loss, without lambda.

        Args:
            x_BTD: the router's input; not read where `prefetched` is given.
            others: as of `JTok`.
        """
        lookup = lookup or self.lookup(_one_a_vector(ids_BT, h_BTD))
        prefetched = prefetched or self.prefetch(x_BTD, lookup)
        choice, weights, probabilities = prefetched.routed
        balance = balance_loss(probabilities, choice, probability=self.balance_probability)
        if lookup.exchange:
            return self._add_fetched(h_BTD, delta_BTD, lookup, prefetched), balance
        out = jtok_kernels.jtok_m(
            _flat(h_BTD), _flat(delta_BTD), lookup.tables, lookup.ids.reshape(-1), _flat(choice),
            _flat(weights), self.scale[...], depth_scale=self.depth_scale, **self._options(lookup),
        )  # fmt: skip
        return out.reshape(h_BTD.shape), balance

    def route(self, x_BTD: jax.Array) -> Route:
        """Return which tables each token reads, and with which weights (Eq. 10)."""
        if self.normed != "shared":
            weight = self.router_norm[...] if self.normed == "own" else None
            x_BTD = rms_norm(x_BTD, weight, eps=self.router_norm_eps)
        bias = self.router_bias[...] if hasattr(self, "router_bias") else None
        return route(x_BTD, self.router[...], bias, top_k=self.top_k)


def _one_a_vector(ids: jax.Array, h: jax.Array) -> jax.Array:
    """Return ids, one a vector of the stream."""
    if ids.shape != h.shape[:-1]:
        raise ConfigError(
            f"ids have the shape {ids.shape} and h {h.shape}; expected {h.shape[:-1]}."
        )
    return ids


def _own_table(rngs: nnx.Rngs, *shape: int, std: float, dtype: str) -> Table:
    one_of(dtype, "table_dtype", DTYPES)
    axes = "XRC" if len(shape) == 3 else "RC"
    return normal(
        rngs, *shape, axes=axes, std=std, dtype=dtype, kind=Table, stream="token", layers=(),
        owner="jtok",
    )  # fmt: skip


def jtok_layer(config: ModelConfig, *, rngs: nnx.Rngs) -> JTok | JTokM:
    """Return the layer that a configuration describes; its table is the model's."""
    jtok, layers = config.jtok, config.num_layers
    name = None if jtok.implementation == "auto" else jtok.implementation
    shared = {"norm": jtok.norm, "eps": jtok.eps, "implementation": name, "rngs": rngs}
    if jtok.kind == "jtok":
        return JTok(None, config.model_dim, scale_init=jtok.gate_scale_init, **shared)
    return JTokM(
        None, config.model_dim, num_layers=layers, num_tables=jtok.num_tables, top_k=jtok.top_k,
        scale_init=jtok.mixture_scale_init, router_init_std=jtok.router_init_std,
        router_norm=jtok.router_norm, router_norm_eps=config.norm_eps,
        router_bias_init=jtok.router_bias_init if jtok.router_bias else None,
        router_share=(len(jtok.table_layers(layers)), layers),
        balance_probability=jtok.balance_probability, **shared,
    )  # fmt: skip


def _some_rows(prefetched: Prefetched, lookup: Lookup) -> jax.Array:
    """Return rows, or mixtures of them, of some tokens; float32 [N, D]."""
    if prefetched.rows_BTD is not None:
        return _some(_flat(prefetched.rows_BTD)).astype(jnp.float32)
    ids, routed = _some(lookup.ids.reshape(-1)), prefetched.routed
    at = () if lookup.layer is None else (lookup.layer,)
    if routed is None:
        return jtok_kernels.as_float(lookup.tables[*at, ids])
    rows = lookup.tables[*at, _some(_flat(routed.choice)), ids[:, None]]
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
