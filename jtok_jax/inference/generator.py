# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Generation of a batch of prompts with one compiled prefill and one compiled decode step.

Random numbers of a text come from the seed, its prompt and the position: neither its place in the
batch nor other prompts change them. Equal prompts are told apart by their order.

On several devices every one has the whole batch and a part of every parameter (`mesh.over_all`).
Products with matrices split along D are partial sums: activations of a few tokens are sent, and no
matrix. Rows are read where they lie. The compiler sees to both, given plain XLA.

Of tables in host memory the rows of a token, for all layers, are read as soon as its id is there.
"""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jtok_jax.data.loader import check_ids
from jtok_jax.errors import ConfigError
from jtok_jax.inference.cache import decode, prefill
from jtok_jax.inference.sampling import Sampling, sample
from jtok_jax.mesh import replicated
from jtok_jax.model.params import Params, bind, declared
from jtok_jax.model.tables import following
from jtok_jax.model.variables import Embedding, Weight
from jtok_jax.model_config import ModelConfig
from jtok_jax.store.reader import RowReader
from jtok_jax.store.rows import with_rows

ENDED_EVERY = 16  # to look at ids waits for the device
PROMPT_MULTIPLE = 64  # prompts are padded to a multiple, so few shapes are ever compiled


def for_inference(config: ModelConfig, params: Params) -> Params:
    """Return `params` with matrices in the compute dtype, as training rounds them in every step.

    Decoding reads half of the bytes, or less. `params` is emptied, each array freed when copied.
    """
    dtype, parameters = jnp.dtype(config.compute_dtype), declared(config)

    def narrowed(name: str, value: jax.Array) -> jax.Array:
        one = parameters[name]
        whole = not issubclass(one.kind, Weight | Embedding) or one.full_precision
        return value if whole or value.dtype.itemsize <= dtype.itemsize else value.astype(dtype)

    return {name: narrowed(name, params.pop(name)) for name in list(params)}


def generate(
    config: ModelConfig,
    params: Params,
    prompts: list[list[int]],
    *,
    tokens: int,
    sampling: Sampling,
    seed: int,
    end_id: int = -1,
    on_ids: Callable[[jax.Array], None] = lambda ids_B: None,
    reader: RowReader | None = None,
) -> np.ndarray:
    """Return the ids [len(prompts), up to `tokens`] that follow each prompt.

    Args:
        params: on one device, or split over a mesh of several.
        end_id: ends a text; what follows it means nothing. Looked for every `ENDED_EVERY` tokens:
            where all texts have one, no more are made. -1: there is none.
        on_ids: called with the next id of every text, int32 [B], as soon as it is on its way.
        reader: of tables in host memory, which `params` lacks.

    Raises:
        ConfigError: no prompt or an empty one, no token to make, or an impossible `sampling`.
        DataError: an id outside [0, vocab_size).
    """
    if not prompts or not all(prompts):
        raise ConfigError("A prompt is empty; begin with the end token to start a document.")
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens}; expected at least 1.")
    sampling.check()
    longest = max(len(prompt) for prompt in prompts)
    padded = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    ids_BT = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        check_ids(np.array(prompt), config.vocab_size, f"prompt {row}")
        ids_BT[row, : len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    capacity = -(-(padded + tokens) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    mesh, config = _mesh_of(params), for_texts(config, params)
    some = reader and reader.fetch(ids_BT)
    logits, cache = _prefill(config, params, ids_BT, lengths_B, capacity, mesh, some)
    before_BC = np.asarray(following(ids_BT, lengths_B, config.context)) if reader else None
    sampling = sampling.without_neutral(config.vocab_size)
    keys = _keys_of(prompts, seed)
    drawn = [_sample(logits, keys, lengths_B, sampling)]
    on_ids(drawn[0])
    for index in range(1, tokens):
        look = end_id >= 0 and index % ENDED_EVERY == 0
        if look and np.any(np.stack(drawn) == end_id, axis=0).all():
            break
        if reader:
            ids_B1 = np.asarray(drawn[-1])[:, None]
            some = reader.fetch(ids_B1, before_BC)
            before_BC = np.concatenate([before_BC, ids_B1 + 1], axis=1)[:, 1:]
        next_ids, cache = _decode(config, params, drawn[-1], cache, keys, sampling, mesh, some)
        drawn.append(next_ids)
        on_ids(next_ids)
    return np.stack([np.asarray(ids_B) for ids_B in drawn], axis=1)


def for_texts(config: ModelConfig, params: Params) -> ModelConfig:
    """Return options for texts of any length, which the compiler can split over several devices.

    Kernels are for one device, or for a part in shard_map. "splash" was asked for windows: a text
    of another length takes what fits it.
    """
    if _mesh_of(params) is None:
        attention = "auto" if config.attention == "splash" else config.attention
        return dataclasses.replace(config, attention=attention)
    jtok = dataclasses.replace(config.jtok, implementation="xla")
    return dataclasses.replace(config, jtok=jtok, attention="chunked")


def _mesh_of(params: Params) -> Mesh | None:
    """Return the several devices that `params` are split over; None for one."""
    found = params["embed"].sharding
    return found.mesh if len(found.device_set) > 1 else None


def _keys_of(prompts: list[list[int]], seed: int) -> jax.Array:
    """Return one random key a prompt, made of its ids and how often they stood before it."""
    before, numbers = collections.Counter(), []
    for prompt in map(tuple, prompts):
        numbers.append(zlib.crc32(np.array([before[prompt], *prompt], "<i4").tobytes()))
        before[prompt] += 1
    return _folded(jax.random.key(seed), np.array(numbers, np.uint32))


@jax.jit
def _folded(key, numbers_B):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers_B)


@jax.jit
def _sample(logits_BV, keys_B, lengths_B, sampling):
    return sample(logits_BV, jax.vmap(jax.random.fold_in)(keys_B, lengths_B), sampling)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _prefill(config, params, ids_BT, lengths_B, capacity, mesh, some=None):
    params, places = with_rows(config, params, some)
    model = bind(config, params)
    logits_BV, cache = prefill(model, ids_BT, lengths_B, capacity=capacity, places=places)
    return _whole(mesh, (logits_BV, cache))


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def _decode(config, params, ids_B, cache, keys_B, sampling, mesh, some=None):
    params, places = with_rows(config, params, some)
    logits_BV, cache = decode(bind(config, params), ids_B, cache, places)
    next_B = _sample(_whole(mesh, logits_BV), keys_B, cache.lengths_B, sampling)
    return _whole(mesh, (next_B, cache))


def _whole(mesh: Mesh | None, tree):
    """Return `tree` with its arrays whole on every device of `mesh`."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, replicated(mesh))
