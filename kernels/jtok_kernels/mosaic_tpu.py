# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The operations for TPUs: forward kernels of the TensorCore; the backward pass is XLA's.

A grid step is a block of tokens. Rows are copied one by one from the table in HBM, those of the
next block while this one is computed. Ids come to scalar memory block by block, so T has no limit.
XLA's scatter-add on TPUs adds in a fixed order, and its backward holds no [V, D] array.

Tables are float32, or bfloat16 packed by `pack_rows`.
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
        tables, choice_TK, weights_TK = xla.as_choice(table, ids_T)
        mixed = tables, at, ids_T, choice_TK, weights_TK
        return self._run(*mixed, stream=(h_TD, delta_TD, scale_D), form=form)

    def jtok_m_forward(
        self, h_TD, delta_TD, tables, at, ids_T, choice_TK, weights_TK, scale_D, form: Form
    ):
        mixed = tables, at, ids_T, choice_TK, weights_TK
        return self._run(*mixed, stream=(h_TD, delta_TD, scale_D), form=form)

    def mix_rows_forward(self, tables, at, ids_T, choice_TK, weights_TK):
        if choice_TK is None:
            tables, choice_TK, weights_TK = xla.as_choice(tables, ids_T)
        return self._run(tables, at, ids_T, choice_TK, weights_TK)

    jtok_backward = staticmethod(xla.jtok_backward)
    jtok_m_backward = staticmethod(xla.jtok_m_backward)
    mix_rows_backward = staticmethod(xla.mix_rows_backward)

    def _run(self, tables, at, ids_T, choice_TK, weights_TK, *, stream=(), form=None):
        stack = tables if at else tables[None]
        layer = at[0].reshape(1) if at else jnp.zeros(1, jnp.int32)
        count, top_k, dim = ids_T.size, choice_TK.shape[1], width(stack)
        blocks = -(-count // BLOCK)
        padded = lambda x: jnp.pad(x, ((0, blocks * BLOCK - count), (0, 0)))
        by_block = lambda x: padded(x).reshape(blocks, 1, -1)
        ids_T = jnp.clip(ids_T, 0, stack.shape[-2] - 1)  # a copy from outside would halt the chip
        ids, choice = by_block(ids_T[:, None]), by_block(choice_TK)

        here, ahead = lambda b, *_: b, lambda b, *_: jnp.minimum(b + 1, blocks - 1)
        scalars = lambda size, at: pl.BlockSpec(
            (1, 1, size), lambda *b: (at(*b), 0, 0), memory_space=pltpu.SMEM
        )
        of_tokens = lambda size: pl.BlockSpec((BLOCK, size), lambda b, *_: (b, 0))
        specs = [scalars(BLOCK, here), scalars(BLOCK, ahead)]
        specs += [scalars(BLOCK * top_k, here), scalars(BLOCK * top_k, ahead)]
        specs += [pl.BlockSpec(memory_space=pl.ANY), of_tokens(top_k)]
        out = jax.ShapeDtypeStruct((count, dim), jnp.float32)
        if stream:
            h_TD, delta_TD, scale_D = stream
            stream = h_TD, delta_TD, scale_D[None]
            specs += [of_tokens(dim), of_tokens(dim), pl.BlockSpec((1, dim), lambda *_: (0, 0))]
            out = jax.ShapeDtypeStruct(h_TD.shape, h_TD.dtype)
        options = {}
        if self.interpret:
            options["interpret"] = pltpu.InterpretParams(
                detect_races=True, uninitialized_memory="nan"
            )
        run = pl.pallas_call(
            functools.partial(_kernel, blocks, top_k, form, len(stream)),
            out_shape=out,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(blocks,),
                in_specs=specs,
                out_specs=of_tokens(dim),
                scratch_shapes=[
                    pltpu.VMEM((2, top_k, BLOCK, stack.shape[-1]), stack.dtype),
                    pltpu.SemaphoreType.DMA((2,)),
                ],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            **options,
        )
        return run(layer, ids, ids, choice, choice, stack, weights_TK, *stream)


def _kernel(blocks, top_k, form: Form | None, num_stream, layer, ids, ids_ahead, choice,
            choice_ahead, tables, weights, *refs):  # fmt: skip
    stream, (out, rows, arrived) = refs[:num_stream], refs[num_stream:]
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
    _compute(rows.at[slot], weights[...], stream, out, form)


def _compute(rows, weights_BK, stream, out, form: Form | None) -> None:
    """`out` of a block from its rows [K, B, D] (or words [K, B, D / 2]) and the stream."""
    packed, dim = rows.dtype == jnp.uint32, out.shape[-1]
    top_k, words = rows.shape[0], rows.shape[-1]

    def mixture(start):
        """{first column: mixture [B, LANES] float32} of the columns held by words `start`..."""
        total = 0.0
        for k in range(top_k):
            part = rows[k, :, pl.ds(start, LANES)]
            parts = jnp.stack(halves(part)) if packed else part.astype(jnp.float32)[None]
            total += weights_BK[:, k : k + 1] * parts
        return {start + half * words: total[half] for half in range(total.shape[0])}

    starts = range(0, words, LANES)
    if form is None:
        for start in starts:
            for column, e in mixture(start).items():
                out[:, pl.ds(column, LANES)] = e
        return
    h, delta, scale = stream
    square = sum(
        jnp.sum(jnp.square(e), axis=-1, keepdims=True)
        for start in starts
        for e in mixture(start).values()
    )
    square = jnp.maximum(square if form.norm == "l2" else square * (1.0 / dim), TINY)
    inverse = 1.0 / (jnp.sqrt(square) + form.eps)
    for start in starts:
        for column, e in mixture(start).items():
            columns = pl.ds(column, LANES)
            scaled, dm = scale[:, columns] * (e * inverse), delta[:, columns]
            if form.depth_scale is None:
                added = (dm.astype(jnp.float32) * (1.0 + scaled)).astype(out.dtype)
                out[:, columns] = h[:, columns] + added
            else:
                added = (form.depth_scale * scaled).astype(out.dtype)
                out[:, columns] = h[:, columns] + dm + added
