# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The operations as Mosaic kernels for NVIDIA GPUs of compute capability 9.0 and newer.

One block (one warpgroup, 128 threads) holds one row at a time in registers, D / 128 entries a
thread, and reads and writes rows in pieces of up to 16 bytes a thread. Blocks are independent: no
atomics, no order between them. Sums over tokens go by the pieces of the plan:

  backward  block n takes pieces n, n + N, ...: the sum of a piece over its tokens in order. The
            piece of a run that is not split becomes the row's gradient at once; a piece of a split
            run goes to its slot.
  merge     adds the slots of every split run in order; XLA writes these few rows over the others.

Bytes at bfloat16, a token and layer: JTok forward 8 D (row, dm, h, out), backward 6 D (dm, g,
d_delta) and 6 D a unique row; JTok-M with K of E tables forward (6 + 2 K) D, backward 2 D (g) and
2 K D (rows, mostly from the cache), and 4 E D a unique row.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jtok_kernels.form import Form
from jtok_kernels.plan import Order, RowPlan, num_split
from jtok_kernels.reference import TINY
from jtok_kernels.xla import as_choice

THREADS = 128
MAX_DIM = 4096  # wider rows no longer fit the registers of a block
MAX_HELD = 7 * 4096  # entries of the K rows of a token and five more vectors, held at once
SHARED = 224 << 10  # bytes of shared memory a block may take for its sums
PROCESSORS = 132  # of an H100 or H200; fixed, so that bits are
REGISTERS = 65536  # of a processor


def resident(dim: int, *, top_k: int = 0, num_tables: int = 0) -> int:
    """How many blocks of a backward pass a processor holds at once, at least 1.

    Registers of a thread are a fit to what ptxas says of these kernels (benchmarks/compiled.py).

    Args:
        top_k, num_tables: K and E of JTok-M; 0: JTok.
    """
    entries = dim // THREADS
    registers = 50 + (4.5 + top_k) * entries if top_k else 32 + 5.25 * entries
    registers = min(256, 8 * math.ceil(registers / 8))  # given out by eights
    shared = 4 * dim * (num_tables or 2)
    return max(1, min(16, REGISTERS // (THREADS * registers), SHARED // shared))


class Tuning(NamedTuple):
    """Select variants of the kernels that differ in speed alone; benchmarks compare them.

    delta_first: the backward pass loads `delta` before it stores `d_delta`.
    bulk_forward: forward kernels fetch their rows by bulk copies into shared memory.
    shared_rows: vectors that the loop of a backward pass does not use wait in shared memory, so
        that their registers hold more blocks.
    auto_barriers: Mosaic puts a barrier around every vector access.
    blocks: of a backward pass; None: as many as the registers let a GPU hold at once.
    """

    delta_first: bool = True
    bulk_forward: bool = True
    shared_rows: bool = True
    auto_barriers: bool = False
    blocks: int | None = None


class MosaicGpu(NamedTuple):
    """The implementation; `interpret` simulates the kernels on a CPU and looks for races."""

    interpret: bool = False
    tuning: Tuning = Tuning()

    def jtok_forward(self, h_TD, delta_TD, table, at, ids_T, scale_D, form: Form):
        stack, layer = _stacked(table, at)
        dim = h_TD.shape[1]

        def body(layer, ids, h, delta, table, scale, out, *rows):
            load = self.loader(h_TD, table)
            t = lax.axis_index("t")
            arrived = self.fetch(rows, h.at[t], delta.at[t], scale)
            e = load(table.at[layer[0], ids[t]])
            inverse = _inverse_norm(_sum(e * e), form, dim)[0]
            h, delta, scale = arrived()
            gate = 1.0 + load(scale) * (e * inverse)
            out[t] = load(h, cast=False) + (load(delta) * gate).astype(out.dtype)

        out = jax.ShapeDtypeStruct(h_TD.shape, h_TD.dtype)
        rows = self.room(dim, h_TD.dtype, delta_TD.dtype, scale_D.dtype)
        run = self.kernel(body, out, grid=h_TD.shape[0], axis="t", scratch=rows)
        streams = map(self.rows, (h_TD, delta_TD))
        return run(layer, ids_T, *streams, stack, self.rows(scale_D))

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
                inverse, inverse_n = _inverse_norm(_sum(e * e), form, dim)
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
        return run(*where, order.token, *_pieces(order), g_TD, delta_TD, stack, scale_D)

    def _jtok_merge(self, where, order: Order, partial, stack, scale_D, form: Form):
        dim, num_unique = partial.shape[1], where[1].size

        def body(layer, unique, split_run, split_slot, partial, table, scale, merged):
            load = self.loader(stack)
            r = lax.axis_index("r")
            total = _total(load, partial, split_slot, r)
            u = jnp.minimum(split_run[r], num_unique - 1)
            e = load(table.at[layer[0], _filled(unique, u, table.shape[1])])
            inverse, inverse_n = _inverse_norm(_sum(e * e), form, dim)
            merged[r] = _pull(load(scale) * total, e, inverse, inverse_n, form, dim)

        out = jax.ShapeDtypeStruct((order.split_run.size, dim), jnp.float32)
        run = self.kernel(body, out, grid=out.shape[0], axis="r")
        return run(*where, order.split_run, order.split_slot, partial, stack, scale_D)

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
            inverse = _inverse_norm(_sum(e * e), form, dim)[0]
            h, delta, scale = arrived()
            added = form.depth_scale * load(scale) * (e * inverse)
            out[t] = load(h, cast=False) + load(delta, cast=False) + added.astype(out.dtype)

        out = jax.ShapeDtypeStruct(h_TD.shape, h_TD.dtype)
        rows = self.room(dim, h_TD.dtype, delta_TD.dtype, scale_D.dtype)
        run = self.kernel(body, out, grid=h_TD.shape[0], axis="t", scratch=rows)
        streams = map(self.rows, (h_TD, delta_TD))
        return run(layer, ids_T, choice_TK, weights_TK, *streams, stack, self.rows(scale_D))

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

        def body(
            layer, unique, token, count, run, start, size, slot, choice, weights, g, tables, scale,
            *outs,
        ):  # fmt: skip
            d_weights, rows, partial, d_scale, sums = outs
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
                        inverse, inverse_n = _inverse_norm(_sum(mixed * mixed), form, dim)
                        q = _pull(scale * cotangent, mixed, inverse, inverse_n, form, dim)
                        d_scale = d_scale + cotangent * (mixed * inverse)
                    for k in range(top_k):
                        d_weights[t, k] = _sum(q * each[k])
                        sums[choice[t, k]] = load(sums.at[choice[t, k]]) + weights[t, k] * q
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
        plan = *where, order.token, *_pieces(order)
        return run(*plan, choice_TK, weights_TK, g_TD, stack, scale_D)

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

    def kernel(self, body, out, *, grid, axis, scratch=(), barriers: bool = False):
        """The function that runs `body` once for each place of the grid.

        barriers: after each access of memory, for bodies whose threads read what others write.
            Those of this file need none: no thread reads an entry that another has written, but
            through a reduction or a bulk copy, which wait by themselves.
        """
        grid, axis = ((grid,), (axis,)) if isinstance(axis, str) else (grid, axis)
        options = {}
        if self.interpret:
            options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
        barriers = barriers or self.tuning.auto_barriers
        params = plgpu.CompilerParams(unsafe_no_auto_barriers=not barriers)
        return plgpu.kernel(
            body, out_type=out, grid=grid, grid_names=axis, scratch_types=scratch,
            compiler_params=params, **options,
        )  # fmt: skip

    def blocks(self, order: Order, dim: int, *, top_k: int = 0, num_tables: int = 0) -> int:
        """Blocks of a backward pass: as many as a GPU holds at once, so that they end together."""
        blocks = self.tuning.blocks or PROCESSORS * resident(
            dim, top_k=top_k, num_tables=num_tables
        )
        return min(blocks, order.piece_run.size)

    def shared(self, count: int, dim: int):
        """Scratch for `keeper`: room for so many vectors of a block."""
        return [plgpu.SMEM((dim,), jnp.float32)] * (count * self.tuning.shared_rows)

    def keeper(self, load, shared):
        """keep(x): a function that returns the vector x, which meanwhile takes no registers.

        Each thread reads back what it wrote itself.
        """
        left = iter(shared)

        def keep(x):
            if not self.tuning.shared_rows:
                return lambda: x
            ref = next(left)
            ref[...] = x
            return lambda: load(ref)

        return keep

    def room(self, dim: int, *dtypes):
        """Scratch for `fetch`: shared memory for rows of `dtypes`, and what tells their arrival."""
        if not self.tuning.bulk_forward:
            return ()
        rows = (plgpu.SMEM((dim // THREADS, THREADS), dtype) for dtype in dtypes)
        return *rows, plgpu.Barrier(num_arrivals=len(dtypes))

    def rows(self, x: jax.Array) -> jax.Array:
        """`x` [..., D] as `fetch` takes it: a bulk copy takes at most 256 entries along an axis."""
        if not self.tuning.bulk_forward:
            return x
        return x.reshape(*x.shape[:-1], x.shape[-1] // THREADS, THREADS)

    def fetch(self, room, *sources):
        """Start copies of `sources`, refs of one row of `rows`, into `room`.

        Returns:
            A function that waits for them and returns their refs. Without bulk copies these are
            `sources`: loads stand where they are used, as the compiler would move them there.
        """
        if not self.tuning.bulk_forward:
            return lambda: sources
        *targets, barrier = room
        for source, target in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(source, target, barrier)

        def arrived():
            plgpu.barrier_wait(barrier)
            return targets

        return arrived

    def loader(self, *arrays: jax.Array):
        """load(ref of [D]): its entries in registers, as float32 unless `cast` is False.

        All rows of a kernel are spread over the threads alike, in vectors of up to 16 bytes of the
        narrowest of `arrays`: 16 where D is a multiple of 1024 (bfloat16) or 512, 4 at D 768.
        """

        def load(ref, *, cast=True):
            if self.interpret:  # it does not know layouts
                values = ref[...]
            else:
                layout = _layout(*arrays, shape=ref.shape)
                values = plgpu.load(ref, layout=layout, optimized=False)
            if values.ndim > 1:  # one row of `rows`
                values = values.reshape(values.size)
            return values.astype(jnp.float32) if cast else values

        return load

    def zeros(self, *arrays: jax.Array):
        """float32 [D], spread as by `loader`: shared memory takes no other of some widths."""
        zeros = jnp.zeros(arrays[0].shape[-1], jnp.float32)
        return zeros if self.interpret else plgpu.layout_cast(zeros, _layout(*arrays))

    def iota(self, *arrays: jax.Array):
        """uint32 [0, 1, ..., D - 1], spread as by `loader` of the same arrays."""
        dim = arrays[0].shape[-1]
        if self.interpret:
            return jnp.arange(dim, dtype=jnp.uint32)
        return plgpu.broadcasted_iota(jnp.uint32, (dim,), 0, layout=_layout(*arrays))


def _layout(*arrays: jax.Array, shape=None):
    dim = arrays[0].shape[-1]
    size = math.gcd(dim // THREADS, 16 // min(array.dtype.itemsize for array in arrays))
    return plgpu.Layout.WG_STRIDED(shape or (dim,), vec_size=size)


def _stacked(table, at):
    """(stack, layer as int32 [1]): a single table is a stack of one."""
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
    """Sum of the slots of split run r, in order."""
    zeros = jnp.zeros(partial.shape[1], jnp.float32)
    add = lambda slot, total: total + load(partial.at[slot])
    return lax.fori_loop(split_slot[r], split_slot[r + 1], add, zeros)


def _filled(unique, u, num_rows: int):
    """Entry u of `unique_U`; where it holds no id the first one, a row that this batch uses."""
    return jnp.where(unique[u] < num_rows, unique[u], unique[0])


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x)


def _inverse_norm(square, form: Form, dim: int):
    """(1 / (n + eps), 1 / n) from the sum of squares; n > 0 also for a row of zeros."""
    square = jnp.maximum(square * form.share(dim), TINY)
    inverse_n = lax.rsqrt(square)
    return 1.0 / (square * inverse_n + form.eps), inverse_n


def _pull(a, e, inverse, inverse_n, form: Form, dim: int):
    """J^T a of e -> e / (n + eps): a / (n + eps) - e (e . a) share / (n (n + eps)^2)."""
    along = _sum(e * a) * form.share(dim)
    return a * inverse - e * (along * inverse_n * inverse * inverse)


def _mixture(load, tables, row, choice, weights, t):
    """(sum_k w_k e_k, the rows e_k) of token t."""
    each = [load(tables.at[choice[t, k], row]) for k in range(choice.shape[1])]
    return sum(weights[t, k] * e for k, e in enumerate(each)), each
