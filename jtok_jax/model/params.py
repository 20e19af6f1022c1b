# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Parameters as a flat dict by name ("blocks/attention/query"), and a model bound to them."""

import functools

import jax
from flax import nnx

from jtok_jax.config import ModelConfig
from jtok_jax.model.transformer import Transformer

Params = dict[str, jax.Array]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Initial values of every parameter, see jtok_jax.model.layers for their distribution."""
    state = nnx.state(Transformer(config, rngs=nnx.Rngs(params=key)))
    return {"/".join(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The model of `config` holding `params` (arrays or tracers)."""
    graph, abstract = _structure(config)
    flat = [
        (path, variable.replace(params["/".join(path)]))
        for path, variable in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@functools.cache
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
