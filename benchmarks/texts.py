# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tokens a second of `generate` beside those of transformers: python benchmarks/generate.py --texts

The same dense weights in one run, from prompts to ids on the host. Arms take turns within a round;
a ratio is the median over rounds of the ratio to transformers within one (10th to 90th percentile).
An earlier commit, checked out elsewhere, runs in a process of its own that waits while others run.
--clock=cpu counts the seconds of all cores, for a machine that does other work; give both libraries
one core (taskset, OMP_NUM_THREADS=1), or waiting threads count too.
"""

import functools
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
from timing import percentiles, record

from jtok_jax.inference.generator import generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.model.params import init_params, to_stored
from jtok_jax.model_config import ModelConfig

KINDS = {
    "greedy": (0.0, 0, 1.0),
    "top-k 50, top-p 0.95": (1.0, 50, 0.95),
    "top-p 0.95": (1.0, 0, 0.95),
}  # temperature, top-k, top-p


def params_of(config: ModelConfig):
    return to_stored(config, jax.jit(lambda key: init_params(config, key))(jax.random.key(0)))


def prompts_of(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)).tolist()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(function, clock: str) -> tuple[np.ndarray, float]:
    """Return what `function` returns, and the seconds it took."""
    start = CLOCKS[clock]()
    result = function()
    return result, CLOCKS[clock]() - start


class Ours:
    """The library that is imported here."""

    def __init__(self, config: ModelConfig, params):
        self._of = config, params

    def generate(self, prompts, clock, *, tokens, sampling):
        options = {"tokens": tokens, "sampling": Sampling(*sampling), "seed": 0}
        return timed(functools.partial(generate, *self._of, prompts, **options), clock)


class Theirs:
    """What transformers has."""

    def __init__(self, llama):
        self._llama = llama

    def generate(self, prompts, clock, **options):
        return timed(functools.partial(self._llama.generate, prompts, **options), clock)


class Before:
    """The library in `folder`, in another process that has the same weights and is told what to do.

    That process runs this file: it reads calls and writes ids, a line of JSON each.
    """

    def __init__(self, folder: str, fields: dict):
        path = os.pathsep.join([folder, os.path.join(folder, "kernels")])
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(fields)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip

    def generate(self, prompts, clock, **options):
        call = {"prompts": prompts, "clock": clock, **options}
        print(json.dumps(call), file=self._process.stdin, flush=True)
        ids, seconds = json.loads(self._process.stdout.readline())
        return np.array(ids), seconds

    def end(self):
        self._process.stdin.close()
        self._process.wait()


def compare(arms: dict, prompts, *, tokens: int, rounds: int, clock: str) -> None:
    """Print tokens a second of every arm and kind of sampling for one batch."""
    for kind, sampling in KINDS.items():
        of = {"tokens": tokens, "sampling": sampling}
        texts = {name: arm.generate(prompts, clock, **of)[0] for name, arm in arms.items()}
        taken = {name: [] for name in arms}
        for index in range(rounds):
            names = list(arms)
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                taken[name].append(arms[name].generate(prompts, clock, **of)[1])
        for name, seconds in taken.items():
            ratio = np.array(taken["transformers"]) / np.array(seconds)
            speed = len(prompts) * tokens / np.median(seconds)
            same = np.mean(texts[name] == texts["transformers"]) if kind == "greedy" else np.nan
            line = f"{len(prompts):5}  {kind:22}{name:14}{speed:10.0f}   {percentiles(ratio)}"
            print(line + (f"   {same:.3f}" if kind == "greedy" else ""), flush=True)
            record(table="texts", batch=len(prompts), sampling=kind, arm=name, speed=float(speed),
                   ratio=float(np.median(ratio)), same=float(same))  # fmt: skip


def main(config: ModelConfig, arguments) -> None:
    from llama import Llama

    params = params_of(config)
    llama = Llama(config, params)
    arms = {"transformers": Theirs(llama), "now": Ours(config, params)}
    print("        ", llama.version)
    if arguments.before:
        names = ("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
        fields = {name: getattr(config, name) for name in (*names, "compute_dtype", "head_dim")}
        arms["before"] = Before(arguments.before, fields)
    print(f"\n{'batch':>5}  {'sampling':22}{'arm':14}{'tokens/s':>10}   / transformers"
          "          equal ids")  # fmt: skip
    for batch in arguments.batches:
        prompts = prompts_of(config, batch, arguments.length)
        options = {name: getattr(arguments, name) for name in ("tokens", "rounds", "clock")}
        compare(arms, prompts, **options)
    if arguments.before:
        arms["before"].end()


def serve() -> None:
    """Generate what is asked for, line by line."""
    config = ModelConfig(**json.loads(sys.argv[1]))
    ours = Ours(config, params_of(config))
    for line in sys.stdin:
        call = json.loads(line)
        ids, seconds = ours.generate(**call)
        print(json.dumps([ids.tolist(), seconds]), flush=True)


if __name__ == "__main__":
    serve()
