# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Parameters as a flat dict by name ("blocks/attention/query"), and a model bound to them."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jtok_kernels import pack_rows, unpack_rows

from jtok_jax.model.jtok import held_as_words
from jtok_jax.model.transformer import Transformer
from jtok_jax.model_config import ModelConfig

Params = dict[str, jax.Array]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Initial values of every parameter, see jtok_jax.model.layers for their distribution."""
    state = nnx.state(Transformer(config, rngs=nnx.Rngs(params=key)))
    return {"/".join(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `init_params`."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The model of `config` holding `params` (arrays or tracers)."""
    graph, abstract = _structure(config)
    flat = [
        (path, variable.replace(params["/".join(path)]))
        for path, variable in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def to_stored(config: ModelConfig, params: Params) -> Params:
    """Logical parameters as a run here holds them: tables as words where the operations want it."""
    if "tables" not in params or not held_as_words(config):
        return params
    return params | {"tables": _pack(params["tables"])}


def to_logical(params: Params) -> Params:
    """The inverse of `to_stored`; also of shapes (`jax.ShapeDtypeStruct`)."""
    tables = params.get("tables")
    if tables is None or tables.dtype != jnp.uint32:
        return params
    if isinstance(tables, jax.ShapeDtypeStruct):
        logical = jax.eval_shape(unpack_rows, tables)
        return params | {"tables": logical.update(sharding=tables.sharding)}
    return params | {"tables": _unpack(tables)}


_pack, _unpack = jax.jit(pack_rows), jax.jit(unpack_rows)


@functools.cache
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
