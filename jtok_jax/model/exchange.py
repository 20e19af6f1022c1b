# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Token tables split over a mesh: every device reads its part for a group of devices.

A group holds the tables once, each device a part: some columns, some of the n_e tables, or some
rows (`TableLayout`). Per layer the devices of a group

  gather    ids (once a step), choices and weights of all tokens of the group
  mix       what this device holds of the rows of every token, weighted: [tokens, columns here]
  exchange  columns for tokens by one all-to-all; parts of a sum, where tables or rows are split,
            by a reduce-scatter before

So one mixed vector a token crosses the wire, in the compute dtype, and one back for its gradient.
Shapes are static, whatever the ids are, and nothing is dropped. Row gradients and their
update stay where the rows are. Between groups, which hold copies, row gradients are summed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jtok_kernels
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jtok_kernels import RowPlan, Shard, row_plan

from jtok_jax.mesh import AXES, TOKENS, TableLayout, num_shards

FETCHED = "fetched rows"  # kept by remat "dots": to fetch again costs more than D entries a token


class Exchange(NamedTuple):
    """One stack of tables on `mesh`, laid out as `layout` says."""

    mesh: Mesh
    layout: TableLayout
    shape: tuple[int, ...]  # [G, R, D] or [G, M, R, D], of all devices
    dtype: str  # of rows that cross the wire
    implementation: str

    # ------------------------------------------------------------------ once a step

    def gather_ids(self, ids_BT: jax.Array) -> jax.Array:
        """Return int32 [copies, tokens of a group]."""
        local = lambda ids: _gather(ids.reshape(-1), self.layout.axes)[None]
        return self._map(local, TOKENS, P(self._copies))(ids_BT)

    def plan(self, ids_NBT: jax.Array, *, max_unique: int | None) -> RowPlan:
        """Return `row_plan` of N microbatches, for the rows that each device holds.

        Unique ids, [row shards x U], and those found, [row shards], are those of all groups. The
        order, [N, copies x row shards, ...], is that of a group.
        """
        num_rows = self._rows_here
        if max_unique is not None and self.layout.rows:
            max_unique += 2  # ids of other shards count as the first or the last row here

        def local(ids_NBT):
            ids = ids_NBT.reshape(ids_NBT.shape[0], -1)
            ids = self._here(_gather(ids, self.layout.axes, axis=1))
            also = _gather(ids, self._copies, axis=1) if self._copies else None
            plan = row_plan(ids, num_rows=num_rows, max_unique=max_unique, also=also)
            order = jax.tree.map(lambda x: x[:, None], plan.order)
            overflow = None if plan.overflow is None else plan.overflow[None]
            found = (plan.found - _outside_alone(ids, also, num_rows))[None]
            return plan._replace(order=order, overflow=overflow, found=found)

        specs = self._plan_specs()
        specs = specs._replace(order=P(None, *specs.order))
        return self._map(local, P(None, *TOKENS), specs)(ids_NBT)

    def place_row_grads(self, row_grads: jax.Array) -> jax.Array:
        """Return row gradients [L, (M,) row shards x U, D] where the rows lie."""
        spec = NamedSharding(self.mesh, P(None, *self._tables_spec()))
        return jax.lax.with_sharding_constraint(row_grads, spec)

    def update(
        self, optimizer, tables, state, unique_U, row_grads, *, rounding_key, rounding_ids_U=None,
        **scalars,
    ):  # fmt: skip
        """Return the result of `update_rows` on every device's part, of a stack or one layer."""
        layout = self.layout
        shard = Shard(columns=layout.columns, rows=layout.rows, experts=layout.experts)

        def local(tables, state, unique_U, row_grads, key, ids_U, scalars):
            return jtok_kernels.update_rows(
                optimizer, tables, state, unique_U, row_grads, **scalars, rounding_key=key,
                rounding_ids_U=ids_U, shard=shard, implementation=self.implementation,
            )  # fmt: skip

        spec = P(*(None,) * (tables.ndim == len(self.shape)), *self._tables_spec())
        of_state = {name: P(*spec[: value.ndim]) for name, value in state.items()}
        in_specs = spec, of_state, P(layout.rows or None), spec, P(), P(), P()
        arguments = tables, state, unique_U, row_grads, rounding_key, rounding_ids_U, scalars
        return self._map(local, in_specs, (spec, of_state))(*arguments)

    # ------------------------------------------------------------------ in every layer

    def fetch(
        self,
        tables: jax.Array,
        layer: jax.Array,
        ids_BT: jax.Array,
        ids_of_group: jax.Array,
        plan: RowPlan | None,
        row_grads: jax.Array | None,
        choice_BTK: jax.Array | None,
        weights_BTK: jax.Array | None,
    ) -> jax.Array:
        """Return rows of JTok, or mixtures of JTok-M, [B, T, D] in the compute dtype.

        Args:
            ids_of_group: of `gather_ids`.
        """
        local = functools.partial(_fetch, self)
        spec = P(None, *self._tables_spec())
        plan_specs = None if plan is None else self._plan_specs()
        in_specs = (
            spec, P(), TOKENS, P(self._copies), plan_specs, self._tables_spec(), TOKENS, TOKENS,
        )  # fmt: skip
        tables = jax.lax.stop_gradient(tables)
        arguments = tables, layer, ids_BT, ids_of_group, plan, row_grads, choice_BTK, weights_BTK
        return checkpoint_name(self._map(local, in_specs, TOKENS)(*arguments), FETCHED)

    def add(self, h_BTD, dm_BTD, e_BTD, scale_D, **form) -> jax.Array:
        """Return the result of `norm_add` on every device's tokens."""

        def local(h, dm, e, scale):
            flat = lambda x: x.reshape(-1, x.shape[-1])
            e = flat(e).astype(jnp.float32)
            out = jtok_kernels.norm_add(flat(h), flat(dm), e, scale, **form)
            return out.reshape(h.shape)

        return self._map(local, (TOKENS, TOKENS, TOKENS, P()), TOKENS)(
            h_BTD, dm_BTD, e_BTD, scale_D
        )

    # ------------------------------------------------------------------ who holds what

    @property
    def _copies(self) -> tuple[str, ...]:
        return tuple(name for name in AXES if name not in self.layout.axes)

    @property
    def _rows_here(self) -> int:
        return self.shape[-2] // num_shards(self.mesh, self.layout.rows)

    def _tables_spec(self) -> P:
        """Return the spec of one layer's tables, [(M,) V, D], and of their row gradients."""
        layout = self.layout
        experts = [layout.experts or None] if len(self.shape) == 4 else []
        return P(*experts, layout.rows or None, layout.columns or None)

    def _plan_specs(self) -> RowPlan:
        rows = self.layout.rows
        here = P(rows or None)
        return RowPlan(here, P(self._copies + rows), here, here)

    def _here(self, ids: jax.Array) -> jax.Array:
        """Return ids counted from the first row here; those of other devices are outside."""
        if not self.layout.rows:
            return ids
        return ids - jax.lax.axis_index(self.layout.rows) * self._rows_here

    def _map(self, local, in_specs, out_specs):
        # Mosaic GPU kernels cannot be traced with check_vma (JAX 0.12): loops over what they load
        # would carry a type that varies over the mesh, and one that does not.
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(local, mesh=self.mesh, **specs, check_vma=False)


def _gather(x: jax.Array, axes: tuple[str, ...], *, axis: int = 0) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def _outside_alone(ids: jax.Array, also: jax.Array | None, num_rows: int) -> jax.Array:
    """Return how many rows, 0 to 2, a plan counts only as ids of other shards are clipped."""
    every = ids if also is None else jnp.concatenate([ids, also], axis=1)
    below = jnp.any(every < 0) & ~jnp.any(every == 0)
    above = jnp.any(every >= num_rows) & ~jnp.any(every == num_rows - 1)
    return below.astype(jnp.int32) + above.astype(jnp.int32)


def _fetch(exchange: Exchange, tables, layer, ids_BT, ids, plan, row_grads, choice, weights):
    """Return this device's part of `Exchange.fetch`: [B, T, D] of its own tokens."""
    layout, mesh = exchange.layout, exchange.mesh
    ids = exchange._here(ids[0])
    inside = (ids >= 0) & (ids < tables.shape[-2])
    ids = jnp.clip(ids, 0, tables.shape[-2] - 1)  # those of other devices are no error
    options = {"layer": layer, "row_grads": row_grads, "plan": plan}
    if plan is not None:
        overflow = None if plan.overflow is None else plan.overflow[0]
        order = jax.tree.map(lambda x: x[0], plan.order)
        options["plan"] = plan._replace(order=order, overflow=overflow)
    mix = functools.partial(
        jtok_kernels.mix_rows, implementation=exchange.implementation, **options
    )
    if choice is None:
        e = mix(tables, ids)
        e = jnp.where(inside[:, None], e, 0.0) if layout.rows else e
    else:
        flat = lambda x: _gather(x.reshape(-1, x.shape[-1]), layout.axes)
        choice, count = flat(choice), tables.shape[1]
        if layout.experts:
            choice = choice - jax.lax.axis_index(layout.experts) * count
        own = inside[:, None] & (choice >= 0) & (choice < count)
        e = mix(tables, ids, choice, jnp.where(own, flat(weights), 0.0))
    e = _to_owners_of_tokens(e.astype(exchange.dtype), layout, mesh)
    return e.reshape(*ids_BT.shape, -1)  # with hash heads if ids have them


def _to_owners_of_tokens(e: jax.Array, layout: TableLayout, mesh: Mesh) -> jax.Array:
    """Return all columns of the tokens here, from those here of all tokens of the group."""
    summed = layout.experts + layout.rows
    blocks = num_shards(mesh, layout.columns), num_shards(mesh, summed)
    e = e.reshape(*blocks, -1, e.shape[-1])
    if summed:
        e = jax.lax.psum_scatter(e, summed, scatter_dimension=1, tiled=True)
    if layout.columns:
        e = jax.lax.all_to_all(e, layout.columns, split_axis=0, concat_axis=3, tiled=True)
    return e.reshape(-1, e.shape[-1])
