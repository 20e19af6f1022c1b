# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""SCONE's training step and its decoding from a table: python benchmarks/scone.py --data=FOLDER

What A_f has to compute in batches of some sizes, and how long finding their n-grams takes. Steps of
a dense model and of the same with an A_f of half its layers, on a prepared corpus, paired: the
ratio beside what FLOPs alone predict. Decoding with a table of n-grams in host memory beside the
dense model. Finding n-grams and reading their rows in mapped tables. Every round takes each arm
once, in an order that rotates. A ratio is the median over rounds of the ratio within a round (10th
to 90th percentile).
"""

import argparse
import contextlib
import dataclasses
import pathlib
import shlex
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from ngrams import VOCAB, drop_from_cache, synthetic
from timing import percentiles, record, say
from train_step import BATCHES, our_arm, run_rounds

from jtok_jax import flops, scone
from jtok_jax.arms_config import ArmsConfig, SconeConfig
from jtok_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from jtok_jax.data.loader import make_batch, open_source
from jtok_jax.data.ngrams import FrequentNgrams, open_ngrams
from jtok_jax.inference.generator import for_inference, generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.mesh import make_mesh, put_batch, put_whole
from jtok_jax.model.ngram_index import build_index, names_of, ngrams_of
from jtok_jax.model.params import init_params
from jtok_jax.model.tables import stream_ids
from jtok_jax.model_config import ModelConfig
from jtok_jax.store.mapped import Contents
from jtok_jax.store.reader import RowReader
from jtok_jax.store.tables import HostTables


def with_ngrams(model: ModelConfig, ngrams: FrequentNgrams, kind: str, room: float) -> ModelConfig:
    options = SconeConfig(kind=kind, num_layers=model.num_layers // 2, room=room)
    streams = f"frequent={ngrams.description.max_n}:{len(ngrams)}:frequent"
    arms = ArmsConfig(names="scone", scone=options)
    return dataclasses.replace(model, arms=arms, streams=streams)


def index_of(model: ModelConfig, ngrams: FrequentNgrams) -> dict[str, jax.Array]:
    """Return the parameters that hold the index."""
    stream = model.id_streams["frequent"]
    index = map(jnp.asarray, build_index(ngrams, stream))
    return dict(zip(names_of(stream.name), index, strict=True))


def batches_of(options, model: ModelConfig, tokens: int) -> Config:
    """Return a configuration with batches of so many tokens of the corpus."""
    train = TrainConfig(batch_size=max(1, tokens // options.seq_len), seq_len=options.seq_len)
    return Config(model=model, train=train, data=DataConfig(path=str(options.data)))


def count_nodes(options, ngrams: FrequentNgrams, tokens: int) -> float:
    """Print and return what A_f computes for each of so many tokens, the mean of some batches."""
    dense = ModelConfig(vocab_size=ngrams.description.vocab_size)
    source, found = open_source(batches_of(options, dense, tokens)), []
    for step in range(1, BATCHES + 1):
        rows, _ = ngrams.match(make_batch(source.sequences(step))[0])
        distinct, lengths = ngrams.tokens(np.unique(rows[rows >= 0]))
        longest = distinct.shape[1]
        prefixes = (distinct[lengths >= size, :size] for size in range(1, longest + 1))
        nodes = sum(len(np.unique(one, axis=0)) for one in prefixes)
        found.append((np.sum(rows >= 0), longest * len(distinct), nodes))
    matched, padded, nodes = np.mean(found, axis=0) / tokens
    say(
        f"for each of {tokens:,} tokens: {matched:.2f} matched, {longest * matched:.2f} if padded, "
        f"{padded:.2f} if also distinct, {nodes:.2f} nodes"
    )
    return nodes


def match(options, dense: ModelConfig, ngrams: FrequentNgrams, tokens: int) -> None:
    """Print how long it takes to find the n-grams of so many tokens, and where."""
    model = with_ngrams(dense, ngrams, "table", options.room)
    stream, index = model.id_streams["frequent"], build_index(ngrams, model.id_streams["frequent"])
    source = open_source(batches_of(options, dense, tokens))
    ids = make_batch(source.sequences(1))[0][:, :tokens]
    on_device = jax.jit(lambda index, ids: stream_ids(stream, ids, index=index))
    index_there, ids_there = jax.device_put((index, ids))
    by_host = ngrams_of(index, stream)
    ways = {
        "on the device": lambda: on_device(index_there, ids_there).block_until_ready(),
        "on the host": lambda: by_host.match(ids),
    }
    times = {name: [] for name in ways}
    for number in range(options.rounds + 1):  # the first is not counted
        for name in list(ways)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            ways[name]()
            times[name].append(1e3 * (time.perf_counter() - began))
    text = ", ".join(f"{name} {np.median(some[1:]):.2f} ms" for name, some in times.items())
    say(f"n-grams of {tokens:,} tokens found: {text}")


def train(options, dense: ModelConfig, ngrams: FrequentNgrams) -> None:
    """Print what a step of training takes over that of dense, and over what FLOPs predict."""
    arms, work = {}, {}
    models = {"dense": dense, "scone": with_ngrams(dense, ngrams, "model", options.room)}
    for name, model in models.items():
        config = batches_of(options, model, options.batch * options.seq_len)
        mesh, source = make_mesh(config.mesh), open_source(config)
        batches = [
            tuple(put_batch(mesh, x) for x in make_batch(source.sequences(step)))
            for step in range(1, BATCHES + 1)
        ]
        arms[name] = arm = our_arm(config, mesh, batches[0])
        if name == "scone":
            arm.state = arm.state._replace(params=arm.state.params | index_of(model, ngrams))
        work[name] = flops.count(model, seq_len=options.seq_len).train_flops
    run_rounds(arms, batches, options.rounds)
    ratio = np.array(arms["scone"].seconds) / arms["dense"].seconds
    predicted = work["scone"] / work["dense"]
    say(f"a step of training: {percentiles(ratio)} of dense, {predicted:.3f} by FLOPs")
    say(f"  over what FLOPs predict: {percentiles(ratio / predicted)}")
    nodes = count_nodes(options, ngrams, options.batch * options.seq_len)
    used = with_ngrams(dense, ngrams, "model", nodes)
    least = flops.count(used, seq_len=options.seq_len).train_flops / work["dense"]
    say(f"  over the {least:.3f} of these nodes: {percentiles(ratio / least)}")
    record(benchmark="scone", what="train", ratio=float(np.median(ratio)), predicted=predicted)


def decode(options, dense: ModelConfig, ngrams: FrequentNgrams) -> None:
    """Print what a token takes with the table in host memory over that of dense."""
    table = with_ngrams(dense, ngrams, "table", options.room)
    config = Config(model=table, mesh=MeshConfig(table_memory="host"))
    mesh, key = make_mesh(config.mesh), jax.random.key(0)
    tables = HostTables(config, mesh, {})
    tables.initialise()
    params = for_inference(dense, init_params(dense, key))
    known = params | index_of(table, ngrams)
    reader = RowReader(config, mesh, tables, put_whole, params=known)
    held = {"dense": (dense, params, None), "scone": (table, reader.without_indices(known), reader)}
    for batch in map(int, options.decode.split(",")):
        prompts = np.random.default_rng(0).integers(0, dense.vocab_size, (batch, 8)).tolist()

        def seconds(name: str, tokens: int, prompts=prompts) -> float:
            model, params, reader = held[name]
            began = time.perf_counter()
            options = {"tokens": tokens, "sampling": Sampling(), "seed": 0, "reader": reader}
            generate(model, params, prompts, **options)
            return time.perf_counter() - began

        times = {name: [] for name in held}
        for number in range(options.rounds + 1):  # the first is not counted
            for name in list(held)[:: 1 if number % 2 else -1]:
                whole, first = (seconds(name, tokens) for tokens in (options.tokens, 1))
                times[name].append((whole - first) / (options.tokens - 1))
        ratio = np.array(times["scone"][1:]) / np.array(times["dense"][1:])
        own, other = (1e3 * np.median(times[name][1:]) for name in ("scone", "dense"))
        text = f"{percentiles(ratio)} of dense; {own:.2f} and {other:.2f} ms"
        say(f"a token at batch {batch}, width {dense.model_dim}: {text}")
        record(benchmark="scone", what="decode", batch=batch, ratio=float(np.median(ratio)))


def look_up(rows: int, options) -> None:
    """Print how long it takes to find n-grams and to read their rows in a mapped bfloat16 table."""
    rng = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        synthetic(rows, path / "ngrams")
        ngrams = open_ngrams(path / "ngrams")
        model = ModelConfig(
            vocab_size=VOCAB, model_dim=options.table_width, num_layers=1,
            streams=f"frequent=3:{len(ngrams)}:frequent",
            arms=ArmsConfig(
                names="scone", scone=SconeConfig(kind="table"), table_dtype="bfloat16"
            ),
        )  # fmt: skip
        mesh_config = MeshConfig(table_memory="host", table_folder=str(path / "table"))
        config = Config(model=model, mesh=mesh_config)
        mesh, contents = make_mesh(mesh_config), Contents("a benchmark", {})
        index = map(jnp.asarray, build_index(ngrams, model.id_streams["frequent"]))
        params = dict(zip(names_of("frequent"), index, strict=True))
        with contextlib.closing(HostTables(config, mesh, {}, contents=contents)) as tables:
            write_rows(tables, rng)
        some = ngrams.tokens(rng.integers(0, len(ngrams), 64 * 512))[0][:, :2].astype(np.int32)

        def look_up_twice(ids_BT: np.ndarray) -> list[float]:
            """Return seconds with pages on the disk, then in memory, and the number of rows."""
            for file in (path / "table").glob("*.rows.npy"):
                drop_from_cache(file)
            times = []
            with contextlib.closing(HostTables(config, mesh, {}, contents=contents)) as tables:
                reader = RowReader(config, mesh, tables, params=params)
                for _ in range(2):
                    began = time.perf_counter()
                    reader.fetch(ids_BT)
                    times.append(time.perf_counter() - began)
                return [*times, len(reader.unique(ids_BT)[1]["frequent"])]

        for shape in ((1, 2), (64, 2), (64, 512)):
            first = lambda number, shape=shape: np.resize(np.roll(some, 97 * number, axis=0), shape)
            found = [look_up_twice(first(number)) for number in range(options.rounds)]
            cold, warm, read = np.median(found, axis=0)
            text = f"{rows:>12,} rows of {options.table_width}, {read:.0f} for {shape} tokens"
            each = f"{1e6 * cold / read:.0f} and {1e6 * warm / read:.1f} us a row"
            say(f"{text}: {1e3 * cold:.2f} ms on the disk, {1e3 * warm:.2f} in memory, {each}")


def write_rows(tables: HostTables, rng: np.random.Generator) -> None:
    """Fill a table in files with numbers, and publish it."""
    ((name, whole),) = tables.saved_shapes.items()
    for first in range(0, whole.shape[1], 1 << 17):
        shape = 1, min(1 << 17, whole.shape[1] - first), whole.shape[2]
        piece = rng.integers(0, 1 << 14, shape, np.uint16).view(jnp.bfloat16)
        tables.fill(name, (0, first, 0), piece)
    tables.finish_restore(sparse=False)
    tables.publish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--data", type=pathlib.Path, required=True, help="folder of jtok_jax.prepare")
    option("--rows", type=int, default=65536, help="n-grams that are kept")
    option("--room", type=float, default=1.0, help="nodes a token of a step")
    option("--width", type=int, default=128)
    option("--layers", type=int, default=4)
    option("--batch", type=int, default=8)
    option("--seq_len", type=int, default=256)
    option("--rounds", type=int, default=12)
    option("--nodes", default="2048,16384,65536", help="tokens of batches to count nodes of")
    option("--matched", default="8,2048,16384,65536", help="tokens to find n-grams of")
    option("--no_training", action="store_true")
    option("--tokens", type=int, default=48, help="of each text")
    option("--decode", default="1,16", help="texts at a time; empty: none")
    option("--looked_up", default="1000000,10000000", help="rows of mapped tables to read")
    option("--table_width", type=int, default=256, help="of these")
    options = parser.parse_args()
    say(f"$ python {shlex.join(sys.argv)}\n{jax.__version__}, {jax.devices()[0].device_kind}")
    dense = ModelConfig(
        compute_dtype="float32", model_dim=options.width, num_layers=options.layers,
        num_heads=options.width // 32, num_kv_heads=options.width // 32,
        ffn_dim=options.width * 43 // 16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "frequent.ngrams"
        of = {"max_n": 5, "rows": options.rows, "min_count": 5, "workers": 2}
        ngrams = scone.build(options.data, file, **of)
        for tokens in map(int, filter(None, options.nodes.split(","))):
            count_nodes(options, ngrams, tokens)
        for tokens in map(int, filter(None, options.matched.split(","))):
            match(options, dense, ngrams, tokens)
        if not options.no_training:
            train(options, dense, ngrams)
        if options.decode:
            decode(options, dense, ngrams)
    for rows in filter(None, options.looked_up.split(",")):
        look_up(int(rows), options)


if __name__ == "__main__":
    main()
