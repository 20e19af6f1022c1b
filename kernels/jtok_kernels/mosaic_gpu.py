# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The operations as Mosaic kernels for NVIDIA GPUs of compute capability 9.0 and newer.

One block (one warpgroup, 128 threads) holds one row at a time in registers, D / 128 entries a
thread. It reads and writes rows in pieces of up to 16 bytes a thread. Blocks are independent: no
atomics, no order between them. Sums over tokens go by the pieces of the plan:

  backward  block n takes pieces n, n + N, ...: the sum of a piece over its tokens in order. The
            piece of a run that is not split becomes the row's gradient at once; a piece of a split
            run goes to its slot.
  merge     adds the slots of every split run in order; XLA writes these few rows over the others.

Bytes at bfloat16, a token and layer, and those a unique row:

  JTok                     forward  8 D (row, dm, h, out)
                           backward 6 D (dm, g, d_delta), and 6 D a unique row
  JTok-M with K of E       forward  (6 + 2 K) D
                           backward 2 D (g) and 2 K D (rows, mostly from the cache), and 4 E D
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jtok_kernels.form import Form
from jtok_kernels.mosaic_gpu_block import Blocks, whole
from jtok_kernels.plan import Order, RowPlan, num_split
from jtok_kernels.reference import TINY
from jtok_kernels.xla import as_choice


class MosaicGpu(Blocks):
    """The implementation: every operation of xla.py as kernels."""

    def jtok_forward(self, h_TD, delta_TD, table, at, ids_T, scale_D, form: Form):
        stack, layer = _stacked(table, at)
        dim = h_TD.shape[1]

        def body(layer, ids, h, delta, table, scale, out, *rows):
            load = self.loader(h_TD, table)
            t = lax.axis_index("t")
            arrived = self.fetch(rows, h.at[t], delta.at[t], scale)
            e = load(table.at[layer[0], ids[t]])
            inverse = _inverse_norm(jnp.sum(e * e), form, dim)[0]
            h, delta, scale = arrived()
            gate = 1.0 + load(scale) * (e * inverse)
            out[t] = load(h, cast=False) + (load(delta) * gate).astype(out.dtype)

        out = jax.ShapeDtypeStruct(h_TD.shape, h_TD.dtype)
        rows = self.room(dim, h_TD.dtype, delta_TD.dtype, scale_D.dtype)
        run = self.kernel(body, out, grid=h_TD.shape[0], axis="t", scratch=rows)
        h, delta, scale = map(self.rows, whole(h_TD, delta_TD, scale_D))
        return run(layer, ids_T, h, delta, stack, scale)

    def jtok_backward(self, g_TD, delta_TD, table, at, ids_T, scale_D, plan: RowPlan, form: Form):
        stack, layer = _stacked(table, at)
        where = layer, plan.unique_U
        d_delta, rows, partial, d_scale = self._jtok_pieces(
            where, plan.order, g_TD, delta_TD, stack, scale_D, form
        )
        merged = self._jtok_merge(where, plan.order, partial, stack, scale_D, form)
        rows = rows.at[plan.order.split_run].set(merged, mode="drop")
        return d_delta, rows, d_scale.sum(axis=0)

    def _jtok_pieces(self, where, order: Order, g_TD, delta_TD, stack, scale_D, form: Form):
        dim, num_unique = g_TD.shape[1], where[1].size
        blocks = self.blocks(order, dim)

        def body(
            layer, unique, token, count, run, start, size, slot, g, delta, table, scale, *outs
        ):
            d_delta, rows, partial, d_scale, *shared = outs
            load = self.loader(g_TD, table)
            keep = self.keeper(load, shared)
            scale_of = keep(load(scale))

            def piece(p, d_scale):
                u = jnp.minimum(run[p], num_unique - 1)
                e = load(table.at[layer[0], _filled(unique, u, table.shape[1])])
                inverse, inverse_n = _inverse_norm(jnp.sum(e * e), form, dim)
                gate = 1.0 + scale_of() * (e * inverse)
                e_of = keep(e)
                begin = start[p]

                def add(i, total):
                    t = token[begin + i]
                    cotangent = load(g.at[t])
                    early = load(delta.at[t]) if self.tuning.delta_first else None
                    d_delta[t] = (cotangent * gate).astype(d_delta.dtype)
                    return total + cotangent * (load(delta.at[t]) if early is None else early)

                total = lax.fori_loop(0, size[p], add, self.zeros(g_TD, table))
                if self.tuning.shared_rows:
                    plgpu.commit_smem()
                e = e_of()

                @pl.when(slot[p] < 0)
                def _whole_run():
                    rows[u] = _pull(scale_of() * total, e, inverse, inverse_n, form, dim)

                @pl.when(slot[p] >= 0)
                def _part_of_a_run():
                    partial[slot[p]] = total

                return d_scale + total * (e * inverse)

            _each_piece(count[0], blocks, piece, d_scale, self.zeros(g_TD, table))

        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        outs = (
            jax.ShapeDtypeStruct(g_TD.shape, delta_TD.dtype),
            shape((num_unique, dim)),
            shape((num_split(order.place.size)[1], dim)),
            shape((blocks, dim)),
        )
        shared = self.shared(2, dim)
        run = self.kernel(body, outs, grid=blocks, axis="n", scratch=shared)
        g, delta, scale = whole(g_TD, delta_TD, scale_D)
        return run(*where, order.token, *_pieces(order), g, delta, stack, scale)

    def _jtok_merge(self, where, order: Order, partial, stack, scale_D, form: Form):
        dim, num_unique = partial.shape[1], where[1].size

        def body(layer, unique, split_run, split_slot, partial, table, scale, merged):
            load = self.loader(stack)
            r = lax.axis_index("r")
            total = _total(load, partial, split_slot, r)
            u = jnp.minimum(split_run[r], num_unique - 1)
            e = load(table.at[layer[0], _filled(unique, u, table.shape[1])])
            inverse, inverse_n = _inverse_norm(jnp.sum(e * e), form, dim)
            merged[r] = _pull(load(scale) * total, e, inverse, inverse_n, form, dim)

        out = jax.ShapeDtypeStruct((order.split_run.size, dim), jnp.float32)
        run = self.kernel(body, out, grid=out.shape[0], axis="r")
        (scale,) = whole(scale_D)
        return run(*where, order.split_run, order.split_slot, partial, stack, scale)

    def jtok_m_forward(
        self, h_TD, delta_TD, tables, at, ids_T, choice_TK, weights_TK, scale_D, form: Form
    ):
        stack, layer = _stacked(tables, at)
        dim = h_TD.shape[1]

        def body(layer, ids, choice, weights, h, delta, tables, scale, out, *rows):
            load = self.loader(h_TD, tables)
            t = lax.axis_index("t")
            arrived = self.fetch(rows, h.at[t], delta.at[t], scale)
            e = _mixture(load, tables.at[layer[0]], ids[t], choice, weights, t)[0]
            inverse = _inverse_norm(jnp.sum(e * e), form, dim)[0]
            h, delta, scale = arrived()
            added = form.depth_scale * load(scale) * (e * inverse)
            out[t] = load(h, cast=False) + load(delta, cast=False) + added.astype(out.dtype)

        out = jax.ShapeDtypeStruct(h_TD.shape, h_TD.dtype)
        rows = self.room(dim, h_TD.dtype, delta_TD.dtype, scale_D.dtype)
        run = self.kernel(body, out, grid=h_TD.shape[0], axis="t", scratch=rows)
        h, delta, scale = map(self.rows, whole(h_TD, delta_TD, scale_D))
        return run(layer, ids_T, *whole(choice_TK, weights_TK), h, delta, stack, scale)

    def jtok_m_backward(
        self,
        g_TD,
        tables,
        at,
        ids_T,
        choice_TK,
        weights_TK,
        scale_D,
        plan: RowPlan,
        form: Form | None,
    ):
        """See xla.jtok_m_backward; `form` None: mixing alone, `g` is the mixtures' cotangent."""
        stack, layer = _stacked(tables, at)
        order, mixing = plan.order, (choice_TK, weights_TK)
        d_weights, rows, partial, d_scale = self._jtok_m_pieces(
            (layer, plan.unique_U), order, *mixing, g_TD, stack, scale_D, form
        )
        merged = self._jtok_m_merge(order, partial)
        rows = rows.at[:, order.split_run].set(merged, mode="drop")
        return d_weights, rows, d_scale.sum(axis=0)

    def _jtok_m_pieces(
        self, where, order: Order, choice_TK, weights_TK, g_TD, stack, scale_D, form
    ):
        dim, num_unique, num_tables = g_TD.shape[1], where[1].size, stack.shape[1]
        top_k = choice_TK.shape[1]
        blocks = self.blocks(order, dim, top_k=top_k, num_tables=num_tables)

        def body(layer, unique, token, count, run, start, size, slot, choice, weights, *refs):
            g, tables, scale, d_weights, rows, partial, d_scale, sums = refs
            load, zeros = self.loader(g_TD, tables), self.zeros(g_TD, tables)
            scale = load(scale)

            def piece(p, d_scale):
                u = jnp.minimum(run[p], num_unique - 1)
                row, begin = unique[u], start[p]
                for e in range(num_tables):
                    sums[e] = zeros

                def add(i, d_scale):
                    t = token[begin + i]
                    mixed, each = _mixture(load, tables.at[layer[0]], row, choice, weights, t)
                    q = cotangent = load(g.at[t])
                    if form is not None:
                        cotangent = form.depth_scale * cotangent
                        inverse, inverse_n = _inverse_norm(jnp.sum(mixed * mixed), form, dim)
                        q = _pull(scale * cotangent, mixed, inverse, inverse_n, form, dim)
                        d_scale = d_scale + cotangent * (mixed * inverse)
                    for k, (table, share, e) in enumerate(each):
                        d_weights[t, k] = jnp.sum(q * e)
                        sums[table] = load(sums.at[table]) + share * q
                    return d_scale

                d_scale = lax.fori_loop(0, size[p], add, d_scale)

                @pl.when(slot[p] < 0)
                def _whole_run():
                    for e in range(num_tables):
                        rows[e, u] = load(sums.at[e])

                @pl.when(slot[p] >= 0)
                def _part_of_a_run():
                    for e in range(num_tables):
                        partial[e, slot[p]] = load(sums.at[e])

                return d_scale

            _each_piece(count[0], blocks, piece, d_scale, zeros)

        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        outs = (
            shape(weights_TK.shape),
            shape((num_tables, num_unique, dim)),
            shape((num_tables, num_split(order.place.size)[1], dim)),
            shape((blocks, dim)),
        )
        sums = plgpu.SMEM((num_tables, dim), jnp.float32)
        run = self.kernel(body, outs, grid=blocks, axis="n", scratch=[sums])
        *mixing, g, scale = whole(choice_TK, weights_TK, g_TD, scale_D)
        return run(*where, order.token, *_pieces(order), *mixing, g, stack, scale)

    def _jtok_m_merge(self, order: Order, partial):
        def body(split_slot, partial, merged):
            e, r = lax.axis_index("e"), lax.axis_index("r")
            merged[e, r] = _total(self.loader(partial), partial.at[e], split_slot, r)

        num_tables, _, dim = partial.shape
        out = jax.ShapeDtypeStruct((num_tables, order.split_run.size, dim), jnp.float32)
        run = self.kernel(body, out, grid=out.shape[:2], axis=("e", "r"))
        return run(order.split_slot, partial)

    def mix_rows_forward(self, tables, at, ids_T, choice_TK, weights_TK):
        if choice_TK is None:
            tables, choice_TK, weights_TK = as_choice(tables, ids_T)
        stack, layer = _stacked(tables, at)

        def body(layer, ids, choice, weights, tables, out):
            load = self.loader(stack)
            t = lax.axis_index("t")
            out[t] = _mixture(load, tables.at[layer[0]], ids[t], choice, weights, t)[0]

        out = jax.ShapeDtypeStruct((ids_T.size, stack.shape[-1]), jnp.float32)
        run = self.kernel(body, out, grid=ids_T.size, axis="t")
        return run(layer, ids_T, choice_TK, weights_TK, stack)

    def mix_rows_backward(self, d_e_TD, tables, at, ids_T, choice_TK, weights_TK, plan: RowPlan):
        single = choice_TK is None
        if choice_TK is None:
            tables, choice_TK, weights_TK = as_choice(tables, ids_T)
        ones = jnp.ones(d_e_TD.shape[-1], jnp.float32)
        d_weights, rows, _ = self.jtok_m_backward(
            d_e_TD, tables, at, ids_T, choice_TK, weights_TK, ones, plan, None
        )
        return (None, rows[0]) if single else (d_weights, rows)


def _stacked(table, at):
    """Return (stack, layer as int32 [1]): a single table is a stack of one."""
    if at:
        return table, at[0].reshape(1)
    return table.reshape(1, *table.shape), jnp.zeros(1, jnp.int32)


def _pieces(order: Order):
    return (
        order.piece_count.reshape(1),
        order.piece_run,
        order.piece_start,
        order.piece_size,
        order.piece_slot,
    )


def _each_piece(count: int, blocks: int, piece, d_scale, zeros) -> None:
    """d_scale[n] = what piece(p, sum) makes of zeros for p = n, n + blocks, ... in turn."""
    n = lax.axis_index("n")
    steps = lax.div(count - n + blocks - 1, blocks)
    d_scale[n] = lax.fori_loop(0, steps, lambda i, total: piece(n + i * blocks, total), zeros)


def _total(load, partial, split_slot, r):
    """Return the sum of the slots of split run r, in order."""
    zeros = jnp.zeros(partial.shape[1], jnp.float32)
    add = lambda slot, total: total + load(partial.at[slot])
    return lax.fori_loop(split_slot[r], split_slot[r + 1], add, zeros)


def _filled(unique, u, num_rows: int):
    """Return entry u of `unique_U`; where it holds no id, the first entry."""
    return jnp.where(unique[u] < num_rows, unique[u], unique[0])


def _inverse_norm(square, form: Form, dim: int):
    """Return (1 / (n + eps), 1 / n) from the sum of squares; n > 0 also for a row of zeros."""
    square = jnp.maximum(square * form.share(dim), TINY)
    inverse_n = lax.rsqrt(square)
    return 1.0 / (square * inverse_n + form.eps), inverse_n


def _pull(a, e, inverse, inverse_n, form: Form, dim: int):
    """Return J^T a of e -> e / (n + eps): a / (n + eps) - e (e . a) share / (n (n + eps)^2)."""
    along = jnp.sum(e * a) * form.share(dim)
    return a * inverse - e * (along * inverse_n * inverse * inverse)


def _mixture(load, tables, row, choice, weights, t):
    """Return (sum_k w_k e_k of token t, [(table, w_k, e_k)]), each read once, ahead of stores."""
    numbers = range(choice.shape[1])
    chosen = [(choice[t, k], weights[t, k]) for k in numbers]
    each = [(table, share, load(tables.at[table, row])) for table, share in chosen]
    return sum(share * e for _, share, e in each), each
