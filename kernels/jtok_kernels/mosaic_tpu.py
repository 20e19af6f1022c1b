# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The operations for TPUs: kernels of the TensorCore over tokens; sums by row are XLA's.

A grid step is a block of tokens. Rows are copied one by one from the table in HBM, those of the
next block while this one is computed. One wait covers all rows of a block. Ids come to scalar
memory block by block, so T has no limit. Two cores (v4, v5p) take one half of the blocks each.
XLA's scatter-add on TPUs adds in a fixed order, and holds no [V, D] array.

Tables are float32, or bfloat16 packed by `pack_rows`.

Bytes at bfloat16, a token and layer: JTok forward 8 D, backward 6 D and what the scatter-add reads
(4 D); JTok-M with K of E tables forward (6 + 2 K) D, backward (6 + 2 K) D and K times 4 D.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jtok_kernels import xla
from jtok_kernels.form import Form
from jtok_kernels.packing import halves, width
from jtok_kernels.plan import RowPlan
from jtok_kernels.reference import TINY

BLOCKS = 256, 128, 64  # tokens of a grid step: the most whose rows and streams fit
SMALLEST = 16  # block, for so few tokens; two tiles of bfloat16
LANES = 128  # entries are computed so many at a time
VMEM = 15 << 20  # bytes a kernel may take; compilers allow 16 MiB if not told otherwise


class Tuning(NamedTuple):
    """Sizes that change how fast the kernels are and none of their results."""

    block: int | None = None  # tokens of a grid step; None: by VMEM
    chunk: int = 64  # tokens computed at a time, whose entries stay in registers
    unroll: int = 8  # tokens whose copies one turn of the loop starts
    cores: int | None = None  # TensorCores that share the blocks; None: those of the device


# Small, so that few tokens already make several blocks, chunks and cores.
SIMULATED = Tuning(block=32, chunk=16, cores=2)


def vmem_bytes(block: int, dim: int, dtype: jnp.dtype, top_k: int) -> int:
    """Return what `block` tokens take: rows and, in float32, h, delta and the result, twice."""
    row = dim * (2 if dtype == jnp.uint32 else dtype.itemsize)
    return 2 * block * (top_k * row + 3 * dim * 4)


def block_tokens(count: int, dim: int, dtype: jnp.dtype, top_k: int, most: int | None) -> int:
    """Return the tokens of a grid step: at most `most`, or as many as VMEM holds.

    It is halved while one block of half the size still holds all `count` tokens.
    """
    fitting = (b for b in BLOCKS if vmem_bytes(b, dim, dtype, top_k) <= VMEM)
    block = most or next(fitting, BLOCKS[-1])
    while block > SMALLEST and block // 2 >= count:
        block //= 2
    return block


def num_cores() -> int:
    """Return the TensorCores of the device compiled for: 2 on v4 and v5p, which share memory."""
    mesh = jax.sharding.get_abstract_mesh()
    device = (None if mesh.empty else mesh.abstract_device) or jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


class _Grid(NamedTuple):
    """How tokens are split: `cores` x `steps` blocks, of which the first `blocks` have tokens."""

    block: int
    chunk: int
    blocks: int
    cores: int

    @property
    def steps(self) -> int:
        return pl.cdiv(self.blocks, self.cores)

    def specs(self, top_k: int):
        """Return what makes BlockSpecs: of scalars now and of the next step, tokens, and shared."""
        last = self.blocks - 1
        here = lambda core, step, *_: jnp.minimum(core * self.steps + step, last)
        ahead = lambda core, step, *_: here(core, jnp.minimum(step + 1, self.steps - 1))
        scalars = lambda size, at: pl.BlockSpec(
            (1, 1, size), lambda *b: (at(*b), 0, 0), memory_space=pltpu.SMEM
        )
        ids = [scalars(self.block, here), scalars(self.block, ahead)]
        choice = [scalars(self.block * top_k, here), scalars(self.block * top_k, ahead)]
        of_tokens = lambda size: pl.BlockSpec((self.block, size), lambda *b: (here(*b), 0))
        return [*ids, *choice, pl.BlockSpec(memory_space=pl.ANY), of_tokens(top_k)], of_tokens


class _Place(NamedTuple):
    """Where a chunk stands: its first token, and whether its core has computed none before."""

    token: jax.Array
    is_first: jax.Array


class MosaicTpu(NamedTuple):
    """The implementation; `interpret` simulates the kernels on a CPU and looks for races."""

    interpret: bool = False
    tuning: Tuning | None = None

    def jtok_forward(self, h_TD, delta_TD, table, at, ids_T, scale_D, form: Form):
        mixed = xla.as_choice(table, ids_T)
        return self.jtok_m_forward(h_TD, delta_TD, mixed[0], at, ids_T, *mixed[1:], scale_D, form)

    def jtok_backward(self, g_TD, delta_TD, table, at, ids_T, scale_D, plan: RowPlan, form: Form):
        tables, choice_TK, weights_TK = xla.as_choice(table, ids_T)
        tokens = tables, at, ids_T, choice_TK, weights_TK
        out = {"d_delta": jax.ShapeDtypeStruct(g_TD.shape, delta_TD.dtype)}
        body = functools.partial(_modulate, form)
        (d_delta,) = self._run(body, *tokens, streams=(g_TD,), scale_D=scale_D, outs=out)
        rows = xla.jtok_row_gradients(g_TD, delta_TD, table, at, scale_D, plan, form)
        return d_delta, *rows

    def jtok_m_forward(
        self, h_TD, delta_TD, tables, at, ids_T, choice_TK, weights_TK, scale_D, form: Form
    ):
        tokens = tables, at, ids_T, choice_TK, weights_TK
        out = {"out": jax.ShapeDtypeStruct(h_TD.shape, h_TD.dtype)}
        body, streams = functools.partial(_modulate, form), (delta_TD, h_TD)
        return self._run(body, *tokens, streams=streams, scale_D=scale_D, outs=out)[0]

    def jtok_m_backward(
        self, g_TD, tables, at, ids_T, choice_TK, weights_TK, scale_D, plan: RowPlan, form: Form
    ):
        tokens = tables, at, ids_T, choice_TK, weights_TK
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        outs = {"d_weights": shape(choice_TK.shape), "d_e": shape(g_TD.shape)}
        outs["d_scale"] = shape((g_TD.shape[1],))
        body = functools.partial(_pull_back, form, ids_T.size)
        d_weights_TK, d_e_TD, d_scale = self._run(
            body, *tokens, streams=(g_TD,), scale_D=scale_D, outs=outs
        )
        rows = xla.mixed_row_gradients(d_e_TD, choice_TK, weights_TK, plan, tables.shape[-3])
        return d_weights_TK, rows, jnp.sum(d_scale, axis=(0, 1))

    def mix_rows_forward(self, tables, at, ids_T, choice_TK, weights_TK):
        if choice_TK is None:
            tables, choice_TK, weights_TK = xla.as_choice(tables, ids_T)
        out = {"out": jax.ShapeDtypeStruct((ids_T.size, width(tables)), jnp.float32)}
        return self._run(_mix, tables, at, ids_T, choice_TK, weights_TK, outs=out)[0]

    def mix_rows_backward(self, d_e_TD, tables, at, ids_T, choice_TK, weights_TK, plan: RowPlan):
        if choice_TK is None:
            return None, xla.sum_by_row(d_e_TD, plan.order, plan.unique_U.size)
        tokens = tables, at, ids_T, choice_TK, weights_TK
        out = {"d_weights": jax.ShapeDtypeStruct(choice_TK.shape, jnp.float32)}
        (d_weights_TK,) = self._run(_dots, *tokens, streams=(d_e_TD,), outs=out)
        rows = xla.mixed_row_gradients(d_e_TD, choice_TK, weights_TK, plan, tables.shape[-3])
        return d_weights_TK, rows

    def _run(
        self, body, tables, at, ids_T, choice_TK, weights_TK, *, outs, streams=(), scale_D=None
    ):
        """Run `body` on every chunk of tokens.

        It is called with a `_Place` and the chunk's rows [K, chunk, words]. References follow: of
        the weights [chunk, K], the `streams` [chunk, D], scale [1, D] if given, and the `outs`.
        These are of tokens, or "d_scale" [D], of which every core has a sum of its own.
        """
        stack = tables if at else tables[None]
        layer = at[0].reshape(1) if at else jnp.zeros(1, jnp.int32)
        count, top_k = choice_TK.shape
        tuning = self.tuning or (SIMULATED if self.interpret else Tuning())
        block = block_tokens(count, width(tables), stack.dtype, top_k, tuning.block)
        blocks = pl.cdiv(count, block)
        cores = min(tuning.cores or num_cores(), blocks)
        grid = _Grid(block, min(block, tuning.chunk), blocks, cores)

        padded = lambda x: jnp.pad(x, ((0, blocks * block - count), (0, 0)))
        by_block = lambda x: padded(x).reshape(blocks, 1, -1)
        ids, choice = by_block(ids_T[:, None]), by_block(choice_TK)

        specs, of_tokens = grid.specs(top_k)
        specs += [of_tokens(stream.shape[1]) for stream in streams]
        vectors = () if scale_D is None else (scale_D[None],)
        specs += [pl.BlockSpec(x.shape, lambda *_: (0, 0)) for x in vectors]
        if "d_scale" in outs:  # a sum of each core
            outs["d_scale"] = outs["d_scale"].update(shape=(cores, 1, *outs["d_scale"].shape))
        of_core = lambda size: pl.BlockSpec((None, 1, size), lambda core, *_: (core, 0, 0))
        spec_of = lambda name, size: (of_core if name == "d_scale" else of_tokens)(size)
        are_shared = *(False for _ in streams), *(True for _ in vectors)
        are_shared += tuple(name == "d_scale" for name in outs)
        options = {}
        if self.interpret:
            options["interpret"] = pltpu.InterpretParams(
                detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
            )
        run = pl.pallas_call(
            functools.partial(_kernel, body, grid, tuning.unroll, are_shared),
            out_shape=tuple(outs.values()),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(cores, grid.steps),
                in_specs=specs,
                out_specs=tuple(spec_of(name, out.shape[-1]) for name, out in outs.items()),
                scratch_shapes=[
                    pltpu.VMEM((2, top_k, block, stack.shape[-1]), stack.dtype),
                    pltpu.SemaphoreType.DMA((2,)),
                ],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True
            ),
            **options,
        )
        return run(layer, ids, ids, choice, choice, stack, weights_TK, *streams, *vectors)


def _kernel(body, grid: _Grid, unroll, are_shared, layer, ids, ids_ahead, choice, choice_ahead,
            tables, weights, *refs):  # fmt: skip
    refs, (rows, arrived) = refs[:-2], refs[-2:]
    top_k = rows.shape[1]
    step = pl.program_id(1)
    block = pl.program_id(0) * grid.steps + step
    slot = step % 2

    def start_copies(ids, choice, slot):
        # What all rows share is found once: every scalar instruction here runs for every row.
        table, here = tables.at[layer[0]], rows.at[slot]

        def some_tokens(i, carry):
            first = pl.multiple_of(i * unroll, unroll)
            targets = here.at[:, pl.ds(first, unroll)]
            for j in range(unroll):
                one = pl.ds(ids[0, 0, first + j], 1)
                for k in range(top_k):
                    source = table.at[choice[0, 0, first * top_k + j * top_k + k], one]
                    target = targets.at[k, pl.ds(j, 1)]
                    pltpu.make_async_copy(source, target, arrived.at[slot]).start()
            return carry

        lax.fori_loop(0, grid.block // unroll, some_tokens, 0)

    def compute(c, carry):
        tokens = pl.ds(pl.multiple_of(c * grid.chunk, grid.chunk), grid.chunk)
        parts = (x if shared else x.at[tokens] for x, shared in zip(refs, are_shared, strict=True))
        place = _Place(block * grid.block + c * grid.chunk, (step == 0) & (c == 0))
        body(place, rows.at[slot, :, tokens], weights.at[tokens], *parts)
        return carry

    @pl.when(step == 0)
    def _first():
        start_copies(ids, choice, 0)

    @pl.when((step + 1 < grid.steps) & (block + 1 < grid.blocks))
    def _ahead():
        start_copies(ids_ahead, choice_ahead, (step + 1) % 2)

    @pl.when(block < grid.blocks)
    def _here():
        # Semaphores count bytes: one wait for as many as all rows of the slot have.
        pltpu.make_async_copy(rows.at[slot], rows.at[slot], arrived.at[slot]).wait()
        lax.fori_loop(0, grid.block // grid.chunk, compute, 0)


# --------------------------------------------------------- what is done with the rows of a chunk


def _modulate(form: Form, _, rows, weights, *refs) -> None:
    """refs: increment, stream, scale, out. Without a stream the gated increment alone."""
    delta, *stream, scale, out = refs
    square = _sum(jnp.square(e) for _, e in _mixtures(rows, weights))
    inverse = _inverse_norm(square, form, out.shape[1])[0]
    for columns, e in _mixtures(rows, weights):
        scaled, dm = scale[:, columns] * (e * inverse), delta[:, columns]
        if form.depth_scale is None:
            added = (dm.astype(jnp.float32) * (1.0 + scaled)).astype(out.dtype)
            out[:, columns] = stream[0][:, columns] + added if stream else added
        else:
            added = (form.depth_scale * scaled).astype(out.dtype)
            out[:, columns] = stream[0][:, columns] + dm + added


def _pull_back(
    form: Form, count: int, place: _Place, rows, weights, g, scale, d_weights, d_e, d_scale
) -> None:
    """Return gradients of mixtures and weights of jtok_m, and the sum of the scale's."""
    dim = g.shape[1]
    cotangent = lambda columns: form.depth_scale * g[:, columns].astype(jnp.float32)
    pulled = lambda columns: scale[:, columns] * cotangent(columns)
    square = _sum(jnp.square(e) for _, e in _mixtures(rows, weights))
    along = _sum(e * pulled(columns) for columns, e in _mixtures(rows, weights))
    inverse, inverse_n = _inverse_norm(square, form, dim)
    radial = along * form.share(dim) * inverse_n * inverse * inverse
    token = place.token + lax.broadcasted_iota(jnp.int32, (g.shape[0], 1), 0)

    @pl.when(place.is_first)
    def _start():
        d_scale[...] = jnp.zeros_like(d_scale)

    for columns, e in _mixtures(rows, weights):
        d_e[:, columns] = pulled(columns) * inverse - e * radial
        share = jnp.where(token < count, cotangent(columns) * (e * inverse), 0.0)
        d_scale[:, columns] += jnp.sum(share, axis=0, keepdims=True)
    _dots(place, rows, None, d_e, d_weights)


def _mix(_, rows, weights, out) -> None:
    for columns, e in _mixtures(rows, weights):
        out[:, columns] = e


def _dots(_, rows, __, d_e, d_weights) -> None:
    """Return d_weights[t, k] = d_e[t] . e_k[t]."""
    for k in range(rows.shape[0]):
        d_weights[:, k : k + 1] = _sum(d_e[:, columns] * e for columns, e in _entries(rows, k))


def _mixtures(rows, weights):
    """Return (columns, sum_k w_k e_k of them, float32 [chunk, LANES]), part by part."""
    for parts in zip(*(_entries(rows, k) for k in range(rows.shape[0])), strict=True):
        each = (weights[:, k : k + 1] * e for k, (_, e) in enumerate(parts))
        yield parts[0][0], sum(each)


def _entries(rows, k: int):
    """Return (columns, entries of row k of every token, float32 [chunk, LANES])."""
    words = rows.shape[-1]
    for start in range(0, words, LANES):
        part = rows[k, :, pl.ds(start, LANES)]
        halves_ = halves(part) if rows.dtype == jnp.uint32 else (part.astype(jnp.float32),)
        for half, e in enumerate(halves_):
            yield pl.ds(start + half * words, LANES), e


def _sum(parts) -> jax.Array:
    """Return the sum over the width, [chunk, 1]."""
    return sum(jnp.sum(part, axis=-1, keepdims=True) for part in parts)


def _inverse_norm(square, form: Form, dim: int):
    """Return (1 / (n + eps), 1 / n) from the sum of squares; n > 0 also for a row of zeros."""
    square = jnp.maximum(square * form.share(dim), TINY)
    n = jnp.sqrt(square)
    return 1.0 / (n + form.eps), 1.0 / n
