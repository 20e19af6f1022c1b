# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The operations for TPUs: kernels of the TensorCore over tokens; sums by row are XLA's.

A grid step is a block of tokens. Rows are copied one by one from the table in HBM, those of the
next block while this one is computed. Ids come to scalar memory block by block, so T has no limit.
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

BLOCK = 64  # tokens of a grid step
LANES = 128  # entries are computed so many at a time
VMEM = 15 << 20  # bytes a kernel may take; compilers allow 16 MiB if not told otherwise


def vmem_bytes(dim: int, dtype: jnp.dtype, top_k: int) -> int:
    """Of a block: the rows of two blocks, and h, delta and the result of two in float32."""
    row = dim * (2 if dtype == jnp.uint32 else dtype.itemsize)
    return 2 * BLOCK * (top_k * row + 3 * dim * 4)


class MosaicTpu(NamedTuple):
    """The implementation; `interpret` simulates the kernels on a CPU and looks for races."""

    interpret: bool = False

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
        outs["d_scale"] = shape((1, g_TD.shape[1]))
        body = functools.partial(_pull_back, form, ids_T.size)
        d_weights_TK, d_e_TD, d_scale = self._run(
            body, *tokens, streams=(g_TD,), scale_D=scale_D, outs=outs
        )
        rows = xla.mixed_row_gradients(d_e_TD, choice_TK, weights_TK, plan, tables.shape[-3])
        return d_weights_TK, rows, d_scale[0]

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
        """`body` on every block of tokens.

        It is called with the block's rows [K, BLOCK, words] and the references of the weights
        [BLOCK, K], the `streams` [BLOCK, D], scale [1, D] if given, and the `outs`: of tokens, or
        "d_scale", which all blocks share.
        """
        stack = tables if at else tables[None]
        layer = at[0].reshape(1) if at else jnp.zeros(1, jnp.int32)
        count, top_k = ids_T.size, choice_TK.shape[1]
        blocks = -(-count // BLOCK)
        padded = lambda x: jnp.pad(x, ((0, blocks * BLOCK - count), (0, 0)))
        by_block = lambda x: padded(x).reshape(blocks, 1, -1)
        ids, choice = by_block(ids_T[:, None]), by_block(choice_TK)

        here, ahead = lambda b, *_: b, lambda b, *_: jnp.minimum(b + 1, blocks - 1)
        scalars = lambda size, at: pl.BlockSpec(
            (1, 1, size), lambda *b: (at(*b), 0, 0), memory_space=pltpu.SMEM
        )
        of_tokens = lambda size: pl.BlockSpec((BLOCK, size), lambda b, *_: (b, 0))
        shared = lambda size: pl.BlockSpec((1, size), lambda *_: (0, 0))
        specs = [scalars(BLOCK, here), scalars(BLOCK, ahead)]
        specs += [scalars(BLOCK * top_k, here), scalars(BLOCK * top_k, ahead)]
        specs += [pl.BlockSpec(memory_space=pl.ANY), of_tokens(top_k)]
        specs += [of_tokens(stream.shape[1]) for stream in streams]
        vectors = () if scale_D is None else (scale_D[None],)
        specs += [shared(scale_D.shape[0]) for _ in vectors]
        spec_of = lambda name, size: shared(size) if name == "d_scale" else of_tokens(size)
        options = {}
        if self.interpret:
            options["interpret"] = pltpu.InterpretParams(
                detect_races=True, uninitialized_memory="nan"
            )
        run = pl.pallas_call(
            functools.partial(_kernel, body, blocks, top_k),
            out_shape=tuple(outs.values()),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(blocks,),
                in_specs=specs,
                out_specs=tuple(spec_of(name, out.shape[1]) for name, out in outs.items()),
                scratch_shapes=[
                    pltpu.VMEM((2, top_k, BLOCK, stack.shape[-1]), stack.dtype),
                    pltpu.SemaphoreType.DMA((2,)),
                ],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            **options,
        )
        return run(layer, ids, ids, choice, choice, stack, weights_TK, *streams, *vectors)


def _kernel(body, blocks, top_k, layer, ids, ids_ahead, choice, choice_ahead, tables, weights,
            *refs):  # fmt: skip
    refs, (rows, arrived) = refs[:-2], refs[-2:]
    block = pl.program_id(0)

    def copies(ids, choice, slot, act):
        def token(r, carry):
            for k in range(top_k):
                source = tables.at[layer[0], choice[0, 0, r * top_k + k], pl.ds(ids[0, 0, r], 1)]
                target = rows.at[slot, k, pl.ds(r, 1)]
                act(pltpu.make_async_copy(source, target, arrived.at[slot]))
            return carry

        lax.fori_loop(0, BLOCK, token, 0)

    @pl.when(block == 0)
    def _first():
        copies(ids, choice, 0, lambda copy: copy.start())

    @pl.when(block + 1 < blocks)
    def _ahead():
        copies(ids_ahead, choice_ahead, (block + 1) % 2, lambda copy: copy.start())

    slot = block % 2
    copies(ids, choice, slot, lambda copy: copy.wait())
    body(rows.at[slot], weights, *refs)


# --------------------------------------------------------- what is done with the rows of a block


def _modulate(form: Form, rows, weights, *refs) -> None:
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


def _pull_back(form: Form, count: int, rows, weights, g, scale, d_weights, d_e, d_scale) -> None:
    """Of jtok_m: gradients of the mixtures and of the weights, and the sum of the scale's."""
    dim = g.shape[1]
    cotangent = lambda columns: form.depth_scale * g[:, columns].astype(jnp.float32)
    pulled = lambda columns: scale[:, columns] * cotangent(columns)
    square = _sum(jnp.square(e) for _, e in _mixtures(rows, weights))
    along = _sum(e * pulled(columns) for columns, e in _mixtures(rows, weights))
    inverse, inverse_n = _inverse_norm(square, form, dim)
    radial = along * form.share(dim) * inverse_n * inverse * inverse
    block = pl.program_id(0)
    token = block * g.shape[0] + lax.broadcasted_iota(jnp.int32, (g.shape[0], 1), 0)

    @pl.when(block == 0)
    def _start():
        d_scale[...] = jnp.zeros_like(d_scale)

    for columns, e in _mixtures(rows, weights):
        d_e[:, columns] = pulled(columns) * inverse - e * radial
        share = jnp.where(token < count, cotangent(columns) * (e * inverse), 0.0)
        d_scale[:, columns] += jnp.sum(share, axis=0, keepdims=True)
    _dots(rows, None, d_e, d_weights)


def _mix(rows, weights, out) -> None:
    for columns, e in _mixtures(rows, weights):
        out[:, columns] = e


def _dots(rows, _, d_e, d_weights) -> None:
    """d_weights[t, k] = d_e[t] . e_k[t]."""
    for k in range(rows.shape[0]):
        d_weights[:, k : k + 1] = _sum(d_e[:, columns] * e for columns, e in _entries(rows, k))


def _mixtures(rows, weights):
    """(columns, sum_k w_k e_k of them, float32 [BLOCK, LANES]), a part of the width at a time."""
    for parts in zip(*(_entries(rows, k) for k in range(rows.shape[0])), strict=True):
        each = (weights[:, k : k + 1] * e for k, (_, e) in enumerate(parts))
        yield parts[0][0], sum(each)


def _entries(rows, k: int):
    """(columns, entries of row k of every token, float32 [BLOCK, LANES])."""
    words = rows.shape[-1]
    for start in range(0, words, LANES):
        part = rows[k, :, pl.ds(start, LANES)]
        halves_ = halves(part) if rows.dtype == jnp.uint32 else (part.astype(jnp.float32),)
        for half, e in enumerate(halves_):
            yield pl.ds(start + half * words, LANES), e


def _sum(parts) -> jax.Array:
    """Sum over the width, [BLOCK, 1]."""
    return sum(jnp.sum(part, axis=-1, keepdims=True) for part in parts)


def _inverse_norm(square, form: Form, dim: int):
    """(1 / (n + eps), 1 / n) from the sum of squares; n > 0 also for a row of zeros."""
    square = jnp.maximum(square * form.share(dim), TINY)
    n = jnp.sqrt(square)
    return 1.0 / (n + form.eps), 1.0 / n
