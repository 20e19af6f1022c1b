# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Pattention (TokenFormer, arXiv 2410.23168, Eq. 5-7): a linear map as attention over slots.

    s = x K^T        [.., n]   scores of n learned slots; nothing is divided by sqrt(D)
    a = gelu(f s / |s|)        |s| over the slots; f = sqrt(n), or of as many as there once were
    y = a V          [.., outputs]

The output depends neither on |x| nor on |K|. A slot whose key is zero changes nothing, as long as f
stays what it was: so a model grows without a change. Slots from before a growth and those it added
are multiplied apart and then summed: so not even a last bit changes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jtok_jax.model.layers import block_norm
from jtok_jax.model.variables import Weight, normal
from jtok_jax.model_config import ModelConfig

TPU_EPS = 1e-5  # of the TPU code, added to |s|
SAFE_EPS = 1e-6  # ours: |s|^2 has its square added, so that a row of zeros is no NaN


def weights(*scores: jax.Array, factor: float, form: str) -> tuple[jax.Array, ...]:
    """Return the weights of slots from their scores, in the dtype of these.

    Computed in float32, where `form` is

        safe    gelu(f s / sqrt(|s|^2 + eps^2)), ours
        torch   gelu(f s / |s|), the published code: NaN where all scores are zero
        tpu     gelu(f s / (|s| + eps)) by its tanh approximation, the published code for TPUs

    Args:
        scores: [.., n], of some slots each; the norm is over all.
        factor: f.
    """
    parts = [s.astype(jnp.float32) for s in scores]
    squares = sum(jnp.square(s).sum(axis=-1, keepdims=True) for s in parts)
    if form == "safe":
        inverse = jax.lax.rsqrt(squares + SAFE_EPS**2)
    else:
        inverse = 1 / (jnp.sqrt(squares) + (TPU_EPS if form == "tpu" else 0.0))
    gelu = functools.partial(jax.nn.gelu, approximate=form == "tpu")
    return tuple(gelu(factor * (s * inverse)).astype(scores[0].dtype) for s in parts)


class Pattention(nnx.Module):
    """A map of some last axes to others: keys [n, inputs] and values [n, outputs], flattened."""

    def __init__(
        self, config: ModelConfig, inputs: tuple[int, ...], outputs: tuple[int, ...], *,
        slots: int, grown_from: tuple[int, ...], rngs: nnx.Rngs,
    ):  # fmt: skip
        """Draw keys and values.

        Args:
            slots: n.
            grown_from: how many there were before each growth; f is the root of the first.
        """
        options, dtype = config.pattention, config.param_dtype
        self.inputs, self.outputs = inputs, outputs
        inputs, outputs = math.prod(inputs), math.prod(outputs)
        stds = {
            "torch": (config.init_std, 2 / (config.num_layers * config.model_dim**0.5)),
            "fan_in": (inputs**-0.5, slots**-0.5),
        }[options.init]
        draw = functools.partial(normal, rngs, axes="SD", dtype=dtype)
        self.key = draw(slots, inputs, std=stds[0])
        self.value = draw(slots, outputs, std=stds[1])
        self.factor, self.form = (*grown_from, slots)[0] ** 0.5, options.form
        self.parts = grown_from

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [.., *outputs] of [.., *inputs], in its dtype."""
        leading = x.shape[: x.ndim - len(self.inputs)]
        x = x.reshape(*leading, -1)
        in_parts = lambda slots: jnp.split(slots[...].astype(x.dtype), self.parts)
        scores = [jnp.einsum("...D,SD->...S", x, key) for key in in_parts(self.key)]

        def mix(scores: list[jax.Array], values: list[jax.Array]) -> jax.Array:
            mixed = weights(*scores, factor=self.factor, form=self.form)
            return sum(a @ value for a, value in zip(mixed, values, strict=True))

        # Else the backward pass would keep several arrays as large as the scores.
        y = jax.checkpoint(mix, prevent_cse=False)(scores, in_parts(self.value))
        return y.reshape(*leading, *self.outputs)


def linear(
    config: ModelConfig, inputs: tuple[int, ...], outputs: tuple[int, ...], *,
    axes: str, std: float, rngs: nnx.Rngs,
) -> Weight | Pattention:  # fmt: skip
    """Return a map of attention: a matrix [*inputs, *outputs] with `axes`, or Pattention."""
    options = config.pattention
    if options.kind == "all":
        slots = {"slots": options.slots, "grown_from": options.slots_before}
        return Pattention(config, inputs, outputs, **slots, rngs=rngs)
    return normal(rngs, *inputs, *outputs, axes=axes, std=std, dtype=config.param_dtype)


def apply_linear(linear: Weight | Pattention, x: jax.Array, equation: str) -> jax.Array:
    """Return the result of a map of `linear`; of a matrix by an equation of `jnp.einsum`."""
    if isinstance(linear, Pattention):
        return linear(x)
    return jnp.einsum(equation, x, linear[...].astype(x.dtype))


class PattentionFeedForward(nnx.Module):
    """A feed-forward that is one Pattention, with the pre-norm's weight."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        options, shape = config.pattention, (config.model_dim,)
        self.norm = block_norm(config)
        slots = {"slots": options.ffn_slots, "grown_from": options.ffn_slots_before}
        self.map = Pattention(config, shape, shape, **slots, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.map(x_BTD)
