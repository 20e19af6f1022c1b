# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Small models, states and corpora shared by tests; sizes are different primes where possible."""

import dataclasses
import functools
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
from jtok_kernels import dense_gradient

from jtok_jax.arms_config import (
    ArmsConfig,
    LowRankConfig,
    NgramConfig,
    SconeConfig,
    ValueEmbeddingConfig,
)
from jtok_jax.config import Config, MeshConfig, TrainConfig
from jtok_jax.data.ngrams import Description, FrequentNgrams
from jtok_jax.mesh import make_mesh
from jtok_jax.model.ngram_index import build_index, names_of
from jtok_jax.model.params import declared_tables, init_params
from jtok_jax.model_config import JtokConfig, ModelConfig, MoeConfig
from jtok_jax.prepare import Recipe, prepare
from jtok_jax.streams import IdStream
from jtok_jax.training import rows, step
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import init_state
from jtok_jax.training.step import make_train_step

DENSE = ModelConfig(
    vocab_size=29,
    model_dim=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_dim=17,
    init_std=0.3,
    compute_dtype="float32",
)
MOE = MoeConfig(num_experts=5, top_k=2, expert_dim=7, shared_dim=11, router_init_std=0.5)
JTOK = JtokConfig(kind="jtok", table_init_std=0.5)
JTOK_M = JtokConfig(kind="jtok_m", mixture_scale_init=0.7, table_init_std=0.5, router_init_std=0.5)

# Every kind of model, by name.
KINDS = {
    "dense": DENSE,
    "dense-jtok": dataclasses.replace(DENSE, jtok=JTOK),
    "dense-jtok_m": dataclasses.replace(DENSE, jtok=JTOK_M),
    "moe": dataclasses.replace(DENSE, moe=MOE),
    "moe-jtok": dataclasses.replace(DENSE, moe=MOE, jtok=JTOK),
    "moe-jtok_m": dataclasses.replace(DENSE, moe=MOE, jtok=JTOK_M),
}
FREQUENT = "frequent.ngrams"  # beside the corpus of tests, those that `with_every_table` reads
ARMS = tuple(field.name for field in dataclasses.fields(ArmsConfig))[2:]


def with_every_table(model: ModelConfig) -> ModelConfig:
    """Every arm beside what `model` has, with tables by all kinds of streams."""
    arms = ArmsConfig(
        names=",".join(ARMS),
        ngram=NgramConfig("bigram,trigram"),
        low_rank=LowRankConfig(stream="bigram", rank=8),
        scone=SconeConfig(kind="table"),
        value_embedding=ValueEmbeddingConfig(stream="trigram", init_std=0.3),
    )
    streams = "bigram=2:38, trigram=3:42:2, frequent=3:119:frequent"
    return dataclasses.replace(model, arms=arms, streams=streams)


def random_ngrams(stream: IdStream, seed: int = 0) -> FrequentNgrams:
    """Draw as many n-grams as a stream has rows, of 2 and 3 tokens; their parts are among them.

    Half of all pairs of tokens, at most, may be among them.
    """
    vocab, rng = stream.vocab_rows, np.random.default_rng(seed)
    pairs = stream.rows if stream.order == 2 else 2 * stream.rows // 3
    first = np.sort(rng.choice(vocab**2, pairs, replace=False))
    triples = [(place, last) for place, pair in enumerate(first) for last in range(vocab)
               if pair % vocab * vocab + last in first]  # fmt: skip
    chosen = rng.choice(len(triples), stream.rows - pairs, replace=False)
    second = np.sort([triples[one][0] * vocab + triples[one][1] for one in chosen])
    keys = [first.astype(np.uint64), second.astype(np.uint64)][: stream.order - 1]
    rows = tuple(map(len, keys)) + (0,) * (stream.order - 3)
    keys += [np.empty(0, np.uint64)] * (stream.order - 3)
    return FrequentNgrams(Description(rows, vocab, vocab, 1, "", ""), keys, keys)


def with_ngrams(config: ModelConfig, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters whose frequent n-grams are those of `random_ngrams`."""
    found = dict(params)
    for name, stream in config.frequent_streams.items():
        index = build_index(random_ngrams(stream), stream)
        found |= zip(names_of(name), map(jnp.asarray, index), strict=True)
    return found


def numbers_of(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters without what n-grams are found in, for `jax.grad`."""
    return {name: value for name, value in params.items() if not name.startswith("ngrams/")}


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Initial parameters with norms, scales, biases and zeros moved away from their values.

    Frequent n-grams are those of `random_ngrams`.
    """
    params = init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    moved = {
        name: value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        if name.endswith(("norm", "scale", "bias")) or not np.any(value)
        else value
        for name, value in params.items()
        if not name.startswith("ngrams/")
    }
    return with_ngrams(config, moved)


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab_size, shape), jnp.int32)


@functools.cache
def training(config: Config):
    """(state, jitted step, optimizer) of a run on one device; nothing is donated."""
    optimizer = make_optimizer(config)
    mesh = one_device()
    state = init_state(config, optimizer, mesh)
    state = state._replace(params=with_ngrams(config.model, state.params))
    return state, jax.jit(make_train_step(config, optimizer, mesh)), optimizer


def gradients(config: Config, params: dict, ids: jax.Array, targets: jax.Array):
    """(losses, gradients by name) of a step, the tables' as dense arrays; to be jitted."""
    microbatches = [step._split(config, array) for array in (ids, targets)]
    plans = rows.make_plans(config, params, microbatches[0], None)
    backbone, tables = make_optimizer(config).split(params)
    losses, grads, row_grads = step._gradients(
        config, backbone, tables, *microbatches, None, plans, None
    )
    told = declared_tables(config.model)
    dense = {
        name: dense_gradient(
            value, plans[told[name].stream].unique_U, num_rows=told[name].shape[-2]
        )
        for name, value in row_grads.items()
    }
    return losses, grads | dense


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig())


def small_config(model: ModelConfig, **train) -> Config:
    """A run of `model` on batches of 4 x 16 tokens."""
    return Config(model=model, train=TrainConfig(batch_size=4, seq_len=16, **train))


def write_documents(folder: pathlib.Path, count: int = 40, seed: int = 0) -> None:
    """Text files of made-up words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
    for index in range(count):
        text = " ".join(rng.choices(words, k=rng.randint(50, 200)))
        (folder / f"{index:03d}.txt").write_text(text + " \u00e9\n")


def small_recipe(folder: pathlib.Path, **changes) -> Recipe:
    """Recipe of a vocabulary of 300 and windows of 64 tokens from the text files of `folder`."""
    recipe = Recipe(
        input=str(folder / "*.txt"),
        valid_input="",
        valid_fraction=0.2,
        vocab_size=300,
        tokenizer="",
        end_token="<|endoftext|>",
        seq_len=64,
        on_bad_text="refuse",
    )
    return dataclasses.replace(recipe, **changes)


def prepare_small_corpus(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Folder of a prepared corpus."""
    text = folder / "text"
    text.mkdir()
    write_documents(text, seed=seed)
    prepare(small_recipe(text), folder / "prepared")
    return folder / "prepared"
