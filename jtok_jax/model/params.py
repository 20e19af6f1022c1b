# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Parameters as a flat dict by name ("blocks/attention/query"), and a model bound to them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jtok_kernels import pack_rows, unpack_rows

from jtok_jax.errors import ConfigError
from jtok_jax.model.operations import Operations, choose_operations, held_alone
from jtok_jax.model.transformer import Transformer
from jtok_jax.model.variables import Index, Parameter, Table
from jtok_jax.model_config import ModelConfig

Params = dict[str, jax.Array]


class Declared(NamedTuple):
    """The metadata of a parameter, see jtok_jax.model.variables."""

    kind: type[Parameter | Index]
    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: str  # with the leading L of blocks
    share: tuple[int, int]
    full_precision: bool
    owner: str
    # Of tables alone, see `Table`.
    stream: str = ""
    layers: tuple[int, ...] = ()
    implementation: str = ""
    top_k: int = 0

    @property
    def is_table(self) -> bool:
        return issubclass(self.kind, Table)

    @property
    def is_index(self) -> bool:
        return issubclass(self.kind, Index)

    @property
    def reads(self) -> int:
        """Return how many times a forward pass reads a table; those that share one count each."""
        return sum(index >= 0 for index in self.layers) if self.layers else 1

    @property
    def grads_shape(self) -> tuple[int, ...]:
        """Return the leading axes of row gradients, (L,) or (L, M)."""
        return (len(self.layers) or 1, *self.shape[1:-2])


@functools.cache
def declared(config: ModelConfig) -> dict[str, Declared]:
    """Return what every parameter of a model says of itself, by name."""
    _, state = _structure(config)
    found = {}
    for path, variable in nnx.to_flat_state(state):
        value, metadata = variable.get_value(), variable.get_metadata()
        fields = {key: metadata[key] for key in Declared._fields if key in metadata}
        fields["axes"] = "L" * ("blocks" in path) + fields["axes"]
        found["/".join(path)] = Declared(type(variable), value.shape, value.dtype, **fields)
    return found


def declared_tables(config: ModelConfig) -> dict[str, Declared]:
    """Return the tables among `declared`."""
    return {name: one for name, one in declared(config).items() if one.is_table}


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Return the initial values of every parameter, drawn as jtok_jax.model.layers says."""
    state = nnx.state(Transformer(config, rngs=nnx.Rngs(params=key)))
    return {"/".join(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def initial_options() -> dict[str, object] | None:
    """Return the compiler options of programs that draw initial values; others round otherwise.

    Run once: on CPUs compiling the random draws in full would take longer than all else.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


@functools.partial(jax.jit, static_argnums=0)
def init_rows(config: ModelConfig, key: jax.Array, ids: dict[str, jax.Array]) -> Params:
    """Return rows of every table as `init_params` draws them; no array of a table's size is made.

    Args:
        ids: int32 [U] by stream, of every stream that a table reads.

    Returns:
        [G, U, D] or [G, M, U, D] by table.
    """
    tables = Transformer(config, rngs=nnx.Rngs(params=key), rows=ids).named_tables
    return {name: table[...] for name, table in tables.items()}


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of `init_params`."""
    found = declared(config).items()
    return {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in found}


def bind(config: ModelConfig, params: Params) -> Transformer:
    """Return the model of `config` holding `params` (arrays or tracers)."""
    graph, abstract = _structure(config)
    flat = [
        (path, variable.replace(params["/".join(path)]))
        for path, variable in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def operations(config: ModelConfig, name: str, *, column_shards: int = 1) -> Operations:
    """Return the implementation of the operations on a table, or on a device's columns of it.

    Raises:
        ConfigError: the one asked for cannot run here.
    """
    table = declared(config)[name]
    several = {"num_tables": table.shape[1], "top_k": table.top_k} if table.top_k else {}
    dim = table.shape[-1] // column_shards
    try:
        return choose_operations(table.implementation, dim=dim, dtype=table.dtype, **several)
    except ValueError as error:
        raise ConfigError(f"model.{table.owner}.implementation: {error}") from error


def to_stored(config: ModelConfig, params: Params) -> Params:
    """Return logical parameters as a run here holds them, some tables as words."""
    tables = {name for name in declared_tables(config) if name in params}
    words = {name for name in tables if held_alone() and operations(config, name).packed}
    return params | {name: _pack(params[name]) for name in words}


def to_logical(params: Params) -> Params:
    """Return the inverse of `to_stored`; also of shapes (`jax.ShapeDtypeStruct`)."""
    return params | {
        name: _logical(value) for name, value in params.items() if value.dtype == jnp.uint32
    }


def _logical(words):
    if isinstance(words, jax.ShapeDtypeStruct):
        return jax.eval_shape(unpack_rows, words).update(sharding=words.sharding)
    return _unpack(words)


_pack, _unpack = jax.jit(pack_rows), jax.jit(unpack_rows)


@functools.cache
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
