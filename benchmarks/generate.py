# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Prefill and decode of dense, JTok and JTok-M models, paired: python benchmarks/generate.py

Milliseconds a token of one sequence: prefill by the prompt's length, decode by the step. A ratio is
the median over rounds of the ratio to dense within a round (10th to 90th percentile).
With --texts the dense model beside transformers instead, see texts.py.
"""

import argparse
import dataclasses
import functools
import runpy
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import texts
from timing import record

from jtok_jax.config_dict import from_config_dict
from jtok_jax.inference.cache import decode, prefill
from jtok_jax.model.params import bind, init_params, to_stored
from jtok_jax.model_config import JtokConfig, ModelConfig

KINDS = {"dense": "none", "jtok": "jtok", "jtok_m": "jtok_m"}


def model_config(arguments, kind: str) -> ModelConfig:
    """The backbone of a file in configs/, or of the quickstart, with other tables."""
    model = ModelConfig()
    if arguments.config:
        model = from_config_dict(runpy.run_path(arguments.config)["get_config"]()).model
    on_cpu = jax.default_backend() == "cpu"
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    jtok = JtokConfig(kind=kind, table_dtype=dtype)
    return dataclasses.replace(model, compute_dtype=dtype, jtok=jtok)


class Arm:
    """A model with its two compiled programs at one batch size."""

    def __init__(self, config: ModelConfig, params, batch: int, length: int):
        self.params = params
        shape = (batch, length)
        self.ids = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size, jnp.int32)
        self.lengths = jnp.full(batch, length, jnp.int32)
        capacity = length + 64
        self._prefill = jax.jit(
            lambda params, *args: prefill(bind(config, params), *args, capacity=capacity)
        )
        self._decode = jax.jit(
            lambda params, *args: decode(bind(config, params), *args), donate_argnums=2
        )
        self.cache = self.prefill().cache
        self.decode()

    def prefill(self):
        return jax.block_until_ready(self._prefill(self.params, self.ids, self.lengths))

    def decode(self):
        step = jax.block_until_ready(self._decode(self.params, self.ids[:, 0], self.cache))
        self.cache = step.cache


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="file in configs/; default: the quickstart's backbone")
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--length", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", help="of compute and tables; default float32 on a CPU")
    parser.add_argument("--texts", action="store_true", help="compare with transformers")
    parser.add_argument("--tokens", type=int, default=64, help="of a text, with --texts")
    parser.add_argument("--clock", default="wall", choices=texts.CLOCKS, help="with --texts")
    parser.add_argument("--before", help="with --texts: folder with an earlier commit")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print("command ", shlex.join(["python", *sys.argv]))
    print("device  ", device.device_kind, f"({device.platform}), jax {jax.__version__}")
    if arguments.texts:
        texts.main(model_config(arguments, "none"), arguments)
        return
    configs = {name: model_config(arguments, kind) for name, kind in KINDS.items()}
    params = {}
    for name, config in configs.items():
        init = jax.jit(functools.partial(init_params, config))
        params[name] = to_stored(config, init(jax.random.key(0)))
    print(f"\n{'phase':9}{'batch':>6} {'model':8}{'ms/token':>10}   / dense")
    for batch in arguments.batches:
        arms = {name: Arm(configs[name], params[name], batch, arguments.length) for name in configs}
        for phase, tokens in (("prefill", arguments.length), ("decode", 1)):
            taken = {name: [] for name in arms}
            for index in range(arguments.rounds):
                names = list(arms)
                shift = index % len(names)
                for name in names[shift:] + names[:shift]:
                    taken[name].append(seconds(getattr(arms[name], phase)))
            for name, values in taken.items():
                ratios = np.array(values) / np.array(taken["dense"])
                low, middle, high = np.percentile(ratios, [10, 50, 90])
                ms = 1e3 * np.median(values) / tokens
                line = (
                    f"{phase:9}{batch:6} {name:8}{ms:10.3f}   {middle:5.3f} ({low:.3f}-{high:.3f})"
                )
                print(line, flush=True)
                record(table="generate", phase=phase, batch=batch, arm=name, ms=float(ms),
                       ratio=float(middle))  # fmt: skip


if __name__ == "__main__":
    main()
