# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Generation of a batch of prompts with one compiled prefill and one compiled decode step."""

import functools

import jax
import numpy as np

from jtok_jax.config import ModelConfig
from jtok_jax.data.loader import check_ids
from jtok_jax.errors import ConfigError
from jtok_jax.inference.cache import decode, prefill
from jtok_jax.inference.sampling import Sampling, sample
from jtok_jax.model.params import Params, bind

PROMPT_MULTIPLE = 64  # prompts are padded to a multiple, so few shapes are ever compiled


def generate(
    config: ModelConfig,
    params: Params,
    prompts: list[list[int]],
    *,
    tokens: int,
    sampling: Sampling,
    seed: int,
) -> np.ndarray:
    """Ids [len(prompts), tokens] that follow each prompt.

    Raises:
        ConfigError: an empty prompt, or a model with arms.
        DataError: an id outside [0, vocab_size).
    """
    if config.arms.names:
        raise ConfigError(
            f"The model has arms ({config.arms.names}), which are for comparing losses: some look "
            "at the token before, which decoding does not hand them."
        )
    if not all(prompts):
        raise ConfigError("A prompt is empty; begin with the end token to start a document.")
    longest = max(len(prompt) for prompt in prompts)
    padded = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    ids_BT = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        check_ids(np.array(prompt), config.vocab_size, f"prompt {row}")
        ids_BT[row, : len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    capacity = -(-(padded + tokens) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    logits, cache = _prefill(config, params, ids_BT, lengths_B, capacity)
    root = jax.random.key(seed)
    drawn = [_sample(logits, jax.random.fold_in(root, 0), sampling)]
    for index in range(1, tokens):
        key = jax.random.fold_in(root, index)
        next_ids, cache = _decode(config, params, drawn[-1], cache, key, sampling)
        drawn.append(next_ids)
    return np.stack([np.asarray(ids_B) for ids_B in drawn], axis=1)


_sample = jax.jit(sample)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(config, params, ids_BT, lengths_B, capacity):
    return prefill(bind(config, params), ids_BT, lengths_B, capacity=capacity)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(config, params, ids_B, cache, key, sampling):
    logits_BV, cache = decode(bind(config, params), ids_B, cache)
    return sample(logits_BV, key, sampling), cache
