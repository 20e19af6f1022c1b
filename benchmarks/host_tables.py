# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in host memory beside tables on the device: python benchmarks/host_tables.py

Steps of train.py at the shapes of the quickstart, on random ids with a Zipf-like frequency. Every
round runs a few steps of each arm, in an order that rotates; a ratio is the median over rounds of
the ratio within a round (10th to 90th percentile). Losses of all arms must be equal.

Before it: bytes that a step moves each way, how fast rows are read and written beside a copy, and
the rate of decode.
"""

import argparse
import dataclasses
import itertools
import shlex
import sys
import time

import jax
import numpy as np
from timing import percentiles, record, say

from jtok_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jtok_jax.config import TableOptimizerConfig as TableOptimizer
from jtok_jax.data.loader import make_batch, open_source
from jtok_jax.inference.generator import for_inference, generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.mesh import make_mesh, put_batch, put_whole
from jtok_jax.model.params import init_params
from jtok_jax.model_config import JtokConfig, ModelConfig
from jtok_jax.store.reader import RowReader
from jtok_jax.store.rows import abstract_rows, bytes_of
from jtok_jax.store.tables import HostTables
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import init_state
from jtok_jax.training.steps import Steps

BATCHES = 16  # distinct batches, taken in turn
HOST = MeshConfig(table_memory="host")


class Arm:
    """A run with its tables at one place; `take` steps it."""

    def __init__(self, config: Config):
        source = open_source(config)
        batches = [make_batch(source.sequences(step)) for step in range(1, BATCHES + 1)]
        self._mesh, optimizer = make_mesh(config.mesh), make_optimizer(config)
        self.state, self.losses, self.seconds = init_state(config, optimizer, self._mesh), [], []
        self._steps = Steps(config, optimizer, self._mesh)
        self._steps.initialise_tables()
        self._steps.compile(self.state)
        self._batches = self._steps.read_ahead(itertools.cycle(batches), first_step=1)

    def take(self, steps: int) -> None:
        """Take some steps, and wait for all that they change."""
        began = time.perf_counter()
        for _ in range(steps):
            batch, rows = next(self._batches)
            arrays = [put_batch(self._mesh, array) for array in batch]
            self.state, metrics = self._steps.train(self.state, (*arrays, *rows))
            self.losses.append(metrics.loss)
        self._steps.settle()
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - began)


def decode(config: Config, options) -> None:
    """Print tokens a second with host tables over those with tables on the device."""
    mesh, model = make_mesh(config.mesh), config.model
    params = for_inference(model, init_params(model, jax.random.key(config.train.seed)))
    tables = HostTables(dataclasses.replace(config, mesh=HOST), mesh, {})
    tables.initialise()
    reader = RowReader(config, mesh, tables, put_whole)
    without = {name: value for name, value in params.items() if name not in tables.whole}
    rng = np.random.default_rng(0)
    for batch in map(int, options.decode.split(",")):
        prompts = rng.integers(0, model.vocab_size, (batch, 8)).tolist()

        def texts(place: str, tokens: int, prompts=prompts):
            held = (params, None) if place == "device" else (without, reader)
            began = time.perf_counter()
            ids = generate(
                model, held[0], prompts, tokens=tokens, sampling=Sampling(), seed=0, reader=held[1]
            )
            return ids, time.perf_counter() - began

        seconds = {"device": [], "host": []}
        found = [texts(place, options.tokens)[0] for place in seconds]
        assert np.array_equal(*found), "texts differ"
        for number in range(options.rounds):
            for place in list(seconds)[:: 1 if number % 2 else -1]:
                whole, first = (texts(place, tokens)[1] for tokens in (options.tokens, 1))
                seconds[place].append((whole - first) / (options.tokens - 1))
        ratio = np.array(seconds["host"]) / np.array(seconds["device"])
        own, other = (1e6 * np.median(seconds[place]) for place in seconds)
        text = f"{percentiles(ratio)} of device; {other:.0f} and {own:.0f} us"
        say(f"  decode at batch {batch}: a token takes {text}")
        record(benchmark="host_decode", batch=batch, ratio=float(np.median(ratio)))


def paired(kind: str, arms: dict[str, Arm], options, *, equal: bool) -> None:
    """Print the time of a step of each arm, over that of the first; taken in turn."""
    for number in range(options.rounds + 1):  # the first is not counted
        names = list(arms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            arms[name].take(options.steps)
    first = next(iter(arms.values()))
    expected = jax.device_get(first.losses)
    for name, arm in arms.items():
        ratio = np.array(arm.seconds[1:]) / np.array(first.seconds[1:])
        middle = 1e3 * np.median(arm.seconds[1:]) / options.steps
        same = "losses equal" if jax.device_get(arm.losses) == expected else "losses OTHER"
        say(f"  {name:15} {middle:8.1f} ms a step  {percentiles(ratio)}  {same * equal}")
        record(benchmark="host_tables", kind=kind, arm=name, ms=middle)


def make_config(options, kind: str, rows: int) -> Config:
    """The shapes of the quickstart, with as many rows as asked for."""
    jtok = JtokConfig(kind=kind, stream="ids", table_dtype=options.table_dtype)
    if rows == 4096:
        jtok = dataclasses.replace(jtok, stream="token")
    streams = "" if rows == 4096 else f"ids=2:{rows}"
    return Config(
        model=ModelConfig(
            compute_dtype="float32",
            jtok=jtok,
            streams=streams,
            remat="dots" if options.streaming else "none",
        ),
        # Streamed rows have another last bit of the norm: without clipping losses are equal.
        optimizer=OptimizerConfig(
            tables=TableOptimizer(kind=options.optimizer),
            clip_norm=0.0 if options.streaming else 1.0,
        ),
        train=TrainConfig(batch_size=options.batch, seq_len=options.seq_len),
        data=DataConfig(source="synthetic"),
    )


def rates(config: Config, options) -> None:
    """Print GB/s of reading and writing the rows of a step, and of a copy as large."""
    optimizer = make_optimizer(config)
    mesh = make_mesh(config.mesh)
    tables = HostTables(dataclasses.replace(config, mesh=HOST), mesh, optimizer.rows)
    tables.initialise()
    rng = np.random.default_rng(0)
    size = abstract_rows(config, mesh, optimizer.rows)
    room = {name: x.shape[0] for name, x in size.ids.items()}
    draw = lambda name, count: np.sort(
        rng.choice(config.model.id_streams[name].num_rows, count, replace=False)
    ).astype(np.int32)
    times = {"read": [], "write": [], "copy": []}
    source = np.ones(1 << 28, np.float32)  # 1 GiB, so that a copy finds nothing in a cache
    for number in range(options.rounds):
        ids = {name: draw(name, count) for name, count in room.items()}
        began = time.perf_counter()
        rows = tables.read(ids, room)
        times["read"].append(time.perf_counter() - began)
        on_device = jax.block_until_ready(tables.put(rows))
        began = time.perf_counter()
        tables.write(ids, on_device)
        times["write"].append(time.perf_counter() - began)
        flat = [x for one in rows.values() for x in one.values()]
        size = sum(x.nbytes for x in flat) // 4
        first = number * size % (len(source) - size)
        began = time.perf_counter()
        np.copyto(np.zeros(size, np.float32), source[first : first + size])
        times["copy"].append(time.perf_counter() - began)
    moved = sum(x.nbytes for x in flat)
    for name, seconds in times.items():
        rate = moved / np.median(seconds) / 1e9
        say(f"  {name:6} {rate:6.2f} GB/s of {moved / 1e6:.1f} MB")
        record(benchmark="host_tables", what=name, rows=options.rows, gb_per_s=rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--kinds", default="jtok,jtok_m")
    option("--rows", type=int, default=65536, help="of a table; 4096: by token, else pairs of ids")
    option("--optimizer", default="lazy_adam")
    option("--table_dtype", default="float32")
    option("--batch", type=int, default=8)
    option("--seq_len", type=int, default=256)
    option("--steps", type=int, default=8, help="of each arm in a round")
    option("--rounds", type=int, default=12)
    option("--prefetch", default="0,1", help="steps read ahead, of one arm each")
    option("--decode", default="1,16,64", help="texts at a time in decode; empty: none")
    option("--streaming", action="store_true", help="an arm more whose layers move rows in turn")
    option("--tokens", type=int, default=64, help="of each text")
    option("--grow", default="", help="numbers of rows, one arm each; nothing else is timed then")
    options = parser.parse_args()
    say(f"$ python {shlex.join(sys.argv)}\n{jax.__version__}, {jax.devices()[0].device_kind}")
    for kind in options.kinds.split(","):
        if options.grow:
            at = lambda rows, kind=kind: dataclasses.replace(
                make_config(options, kind, int(rows)), mesh=HOST
            )
            arms = {f"{int(rows):,} rows": Arm(at(rows)) for rows in options.grow.split(",")}
            paired(kind, arms, options, equal=False)
            continue
        config = make_config(options, kind, options.rows)
        optimizer = make_optimizer(config)
        moved = bytes_of(abstract_rows(config, make_mesh(config.mesh), optimizer.rows).leaves)
        say(f"{kind}: at most {moved / 1e6:.1f} MB of rows and their state a step, each way")
        rates(config, options)
        if options.decode:
            decode(config, options)
        host = lambda depth, config=config: dataclasses.replace(
            config, mesh=dataclasses.replace(HOST, table_prefetch=depth)
        )
        arms = {"device": Arm(config)}
        for depth in map(int, options.prefetch.split(",")):
            arms[f"host, {depth} ahead"] = Arm(host(depth))
        if options.streaming:
            mesh = dataclasses.replace(HOST, table_prefetch=0, table_streaming=True)
            arms["host, streamed"] = Arm(dataclasses.replace(config, mesh=mesh))
        paired(kind, arms, options, equal=True)


if __name__ == "__main__":
    main()
