# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Our parameters and the tensors of a Hugging Face decoder: names and axes, both ways.

A tensor of theirs is [out, in] for a matrix and one axis for anything else. Ours is its transpose
with heads as an axis of their own, stacked over layers. Both turn the two halves of a head
(`layers.rotate`), so no entry changes its place.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jtok_jax.model.params import declared
from jtok_jax.model_config import ModelConfig

OF_MODEL = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
OF_LAYER = {
    "attention/norm": "input_layernorm.weight",
    "attention/query": "self_attn.q_proj.weight",
    "attention/key": "self_attn.k_proj.weight",
    "attention/value": "self_attn.v_proj.weight",
    "attention/out": "self_attn.o_proj.weight",
    "attention/query_bias": "self_attn.q_proj.bias",
    "attention/key_bias": "self_attn.k_proj.bias",
    "attention/value_bias": "self_attn.v_proj.bias",
    "attention/out_bias": "self_attn.o_proj.bias",
    "attention/query_norm": "self_attn.q_norm.weight",
    "attention/key_norm": "self_attn.k_norm.weight",
    "ffn/norm": "post_attention_layernorm.weight",
    "ffn/gate": "mlp.gate_proj.weight",
    "ffn/up": "mlp.up_proj.weight",
    "ffn/down": "mlp.down_proj.weight",
}
_INPUTS = {"attention/out": 2}  # axes of ours that a token is multiplied along; else the first
_BLOCKS = "blocks/"


class Tensor(NamedTuple):
    """One tensor of theirs, and where it lies in ours."""

    ours: str  # such as "blocks/attention/query"
    layer: int | None  # index into ours
    theirs: str
    shape: tuple[int, ...]  # of ours, without the layers
    inputs: int  # leading axes of ours that are "in" of theirs; 0: nothing is transposed

    @property
    def their_shape(self) -> tuple[int, ...]:
        if not self.inputs:
            return self.shape if self.ours == "embed" else (int(np.prod(self.shape)),)
        split = self.shape[: self.inputs], self.shape[self.inputs :]
        return tuple(int(np.prod(part)) for part in reversed(split))

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """Return a tensor of theirs in our shape."""
        return (value.T if self.inputs else value).reshape(self.shape)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Return a part of our parameter in their shape."""
        if not self.inputs:
            return value.reshape(self.their_shape)
        return value.reshape(self.their_shape[::-1]).T


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Yield the tensors of a decoder without tables and experts, by our parameters."""
    for ours, one in declared(config).items():
        if ours in OF_MODEL:
            sizes = zip(one.axes, one.shape, strict=True)
            shape = tuple(config.vocab_size if axis == "V" else size for axis, size in sizes)
            yield Tensor(ours, None, OF_MODEL[ours], shape, int(ours == "head"))
        elif ours.removeprefix(_BLOCKS) in OF_LAYER:
            name, shape = ours.removeprefix(_BLOCKS), one.shape[1:]
            matrix = OF_LAYER[name].endswith("proj.weight")
            inputs = _INPUTS.get(name, 1) if matrix else 0
            for layer in range(config.num_layers):
                theirs = f"model.layers.{layer}.{OF_LAYER[name]}"
                yield Tensor(ours, layer, theirs, shape, inputs)
