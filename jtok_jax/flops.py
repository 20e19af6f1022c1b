# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Exact parameter, FLOP and byte counts, read off what the parameters of a model declare."""

import dataclasses
import math

from jtok_jax.model.params import Declared, declared
from jtok_jax.model.variables import Vector, Weight
from jtok_jax.model_config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}

# Dense bfloat16 matmul FLOP/s of one chip, from the vendors' data sheets (without sparsity), by the
# whole name that JAX gives it: a part of a chip, or a variant, is not its big brother.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak of one device by its kind, None if that is not known."""
    return PEAK_FLOPS.get(device_kind)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Exact integers of one model.

    `active` leaves out routed experts a token does not choose and all tables. FLOPs are per token
    of a sequence of `seq_len`: 2 per multiply-add of every matmul, of attention over the causal
    half, and of mixing and gating with tables. Left out are norms, softmax, activations, the
    optimizer, and additions and gates of arms. Training is forward plus twice forward;
    recomputation is not counted. SCONE's A_f counts in training alone, for all its room: tables of
    its outputs serve. It has no part in `active`.
    """

    backbone: int
    tables: int
    active: int
    active_without_embedding: int
    table_bytes: int
    forward_flops: int
    train_flops: int

    @property
    def total(self) -> int:
        return self.backbone + self.tables


def count(config: ModelConfig, *, seq_len: int) -> Counts:
    """Return the counts of `config`; see `Counts` for what they include."""
    parameters = [one for one in declared(config).values() if not one.is_index]
    tables = [one for one in parameters if one.is_table]
    of_ngrams = [one for one in parameters if one.owner == "scone" and not one.is_table]
    dense = [one for one in parameters if not one.is_table and one not in of_ngrams]
    backbone = sum(map(_size, dense))
    idle = sum(_size(one) - _share(one) for one in dense if issubclass(one.kind, Weight))
    forward = 2 * sum(_share(one) for one in dense if not issubclass(one.kind, Vector))
    forward += _other_flops(config, seq_len)
    return Counts(
        backbone=backbone + sum(map(_size, of_ngrams)),
        tables=sum(map(_size, tables)),
        active=backbone - idle,
        active_without_embedding=backbone - idle - sum(_size(x) for x in dense if "V" in x.axes),
        table_bytes=sum(_size(one) * one.dtype.itemsize for one in tables),
        forward_flops=forward,
        train_flops=3 * (forward + _ngram_flops(config, of_ngrams)),
    )


def _ngram_flops(config: ModelConfig, parameters: list[Declared]) -> int:
    """Return FLOPs a token of A_f: those of a node, for as many as there is room."""
    if not parameters:
        return 0
    options, own = config.arms.scone, config.ngram_model
    order = config.id_streams[options.stream].order
    matmuls = 2 * sum(map(_share, (one for one in parameters if issubclass(one.kind, Weight))))
    attention = 4 * order * own.num_heads * own.head_size * own.num_layers
    return round(min(options.room, order) * (matmuls + attention))


def _size(one: Declared) -> int:
    return math.prod(one.shape)


def _share(one: Declared) -> int:
    """Return the entries that a token is multiplied by."""
    part, whole = one.share
    return _size(one) * part // whole


def _other_flops(config: ModelConfig, seq_len: int) -> int:
    """Return FLOPs of attention and of what JTok does to rows."""
    carrying = len(config.jtok.table_layers(config.num_layers))
    # Scores and mixing over (seq_len + 1) / 2 keys on average: 2 x 2 x keys x N x H.
    attention = 2 * (seq_len + 1) * config.num_heads * config.head_size * config.num_layers
    return attention + 2 * (config.jtok.rows_per_token + 1) * config.model_dim * carrying
