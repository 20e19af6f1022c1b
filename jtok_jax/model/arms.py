# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Layers that JTok is compared with and goes together with. An arm changes what it overrides.

A table of an arm lies at the top of the model, a stack for all layers, see `arm_tables`. Its rows
arrive as [B, T, D], float32 on one device. Parameters here are those of one layer.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jtok_kernels import reference

from jtok_jax.model.variables import Table, Vector, Weight, normal, owned
from jtok_jax.model_config import ModelConfig


class Arm(nnx.Module):
    """A layer's part that leaves everything as it is."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        pass

    def values(self, value_BTKH: jax.Array, rows_BTC: jax.Array | None) -> jax.Array:
        """Return the values of attention."""
        return value_BTKH

    def increment(
        self, dm_BTD: jax.Array, normed_BTD: jax.Array, rows_BTD: jax.Array | None
    ) -> jax.Array:
        """Return the increment of the feed-forward, which read `normed`."""
        return dm_BTD


class Adapter(Arm):
    """A parallel adapter: dm + gelu(x down) up, where up starts at zero."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, options, dtype = config.model_dim, config.arms.adapter, config.param_dtype
        self.down = normal(rngs, dim, options.width, axes="Da", std=options.init_std, dtype=dtype)
        self.up = Weight(jnp.zeros((options.width, dim), dtype), "aD")

    def increment(self, dm_BTD, normed_BTD, rows_BTD):
        dtype = dm_BTD.dtype
        hidden_BTa = jax.nn.gelu(normed_BTD @ self.down[...].astype(dtype))
        return dm_BTD + hidden_BTa @ self.up[...].astype(dtype)


class Film(Arm):
    """FiLM: dm (1 + c gain) + c shift with c = x down, where gain and shift start at zero."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, options, dtype = config.model_dim, config.arms.film, config.param_dtype
        self.down = normal(rngs, dim, options.rank, axes="Df", std=options.init_std, dtype=dtype)
        self.gain = Weight(jnp.zeros((options.rank, dim), dtype), "fD")
        self.shift = Weight(jnp.zeros((options.rank, dim), dtype), "fD")

    def increment(self, dm_BTD, normed_BTD, rows_BTD):
        dtype = dm_BTD.dtype
        c_BTf = normed_BTD @ self.down[...].astype(dtype)
        gain_BTD, shift_BTD = (c_BTf @ w[...].astype(dtype) for w in (self.gain, self.shift))
        return dm_BTD * (1 + gain_BTD) + shift_BTD


class DeepEmbed(Arm):
    """DeepEmbed: dm (1 + E[x]), which is JTok without norm and scale.

    It differs from RWKV-8: there the ones are part of E, which weight decay would turn off.
    """

    def increment(self, dm_BTD, normed_BTD, rows_BTD):
        return dm_BTD * (1 + rows_BTD.astype(dm_BTD.dtype))


class LowRank(Arm):
    """JTok (Eq. 7 to 9 of arXiv 2602.00800) with the row A[x] out: a table of few columns."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, options = config.model_dim, config.arms.low_rank
        self.out = normal(
            rngs, options.rank, dim, axes="rD", std=options.rank**-0.5, dtype=config.param_dtype,
            full_precision=True,
        )  # fmt: skip
        self.scale = Vector(jnp.full(dim, options.scale_init, jnp.float32), "D")
        self.options = options

    def increment(self, dm_BTD, normed_BTD, rows_BTD):
        e_BTD = rows_BTD.astype(jnp.float32) @ self.out[...].astype(jnp.float32)
        gate_BTD = reference.gate(
            e_BTD, self.scale[...], norm=self.options.norm, eps=self.options.eps
        )
        return (dm_BTD.astype(jnp.float32) * gate_BTD).astype(dm_BTD.dtype)


class ValueEmbedding(Arm):
    """Value embeddings: v + E[x] in the attention of every layer.

    Zhou et al. 2024 (arXiv 2410.17897) take the first layer's values. A table for each layer is
    what the speed runs of nanoGPT made of it, with learned weights that are left out here.
    """

    def values(self, value_BTKH, rows_BTC):
        return value_BTKH + rows_BTC.reshape(value_BTKH.shape).astype(value_BTKH.dtype)


LAYERS: dict[str, type[Arm]] = {
    "adapter": Adapter,
    "deep_embed": DeepEmbed,
    "film": Film,
    "low_rank": LowRank,
    "ngram": Arm,  # at the input alone, see `arm_tables`
    "scone": Arm,  # at the input alone, see `jtok_jax.model.scone`
    "value_embedding": ValueEmbedding,
}


class Arms(nnx.Module):
    """The arms of one layer, or, made by `arm_tables`, the tables of all."""

    def __init__(self, members: dict[str, nnx.Module]):
        for name, member in members.items():
            setattr(self, name, member)


class ArmTables(nnx.Module):
    """The tables of one arm, by name."""

    def __init__(self, tables: dict[str, Table]):
        for name, table in tables.items():
            setattr(self, name, table)


def arms_of_layer(config: ModelConfig, *, rngs: nnx.Rngs) -> Arms:
    """Return one layer's part of the arms that are on."""
    chosen = config.arms.chosen()
    return Arms({name: owned(LAYERS[name](config, rngs=rngs), name) for name in chosen})


def arm_tables(config: ModelConfig, *, rngs: nnx.Rngs, rows: Mapping[str, jax.Array]) -> Arms:
    """Return the tables of the arms that are on: one a stream at the input, or one a layer."""
    dim, options = config.model_dim, config.arms
    in_layers = {  # columns, standard deviation
        "deep_embed": (dim, 0.0),
        "low_rank": (options.low_rank.rank, options.low_rank.init_std),
        "value_embedding": (
            config.num_kv_heads * config.head_size, options.value_embedding.init_std
        ),
    }  # fmt: skip

    def table(arm: str, stream: str, layers: tuple[int, ...], columns: int, std: float) -> Table:
        pad = config.padded_vocab - config.vocab_size if stream == "token" else 0
        shape = max(len(layers), 1), config.id_streams[stream].num_rows - pad, columns
        metadata = {"axes": "GRC", "kind": Table, "stream": stream, "layers": layers}
        metadata |= {"owner": arm, "rows": rows.get(stream), "dtype": options.table_dtype}
        return normal(rngs, *shape, std=std, pad=(pad, 0), **metadata)

    found = {}
    for arm, streams in options.table_streams.items():
        if arm in in_layers:
            layers = tuple(range(config.num_layers))
            found[arm] = {"table": table(arm, *streams, layers, *in_layers[arm])}
        else:
            std = config.embed_std if arm == "scone" else 0.0  # in place of the embedding, or added
            found[arm] = {name: table(arm, name, (), dim, std) for name in streams}
    return Arms({arm: ArmTables(tables) for arm, tables in found.items()})


def table_name(arm: str, table: str = "table") -> str:
    """Return the path of an arm's table in the model."""
    return f"arms/{arm}/{table}"
