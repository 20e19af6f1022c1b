# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Time of a step on several devices, paired: XLA_FLAGS=--xla_force_host_platform_device_count=8
python benchmarks/sharded_step.py

Arms: the backbone without tables; tables split by column with the exchange of
jtok_jax/model/exchange.py; and the same tables left to XLA's own partitioner (gspmd). On simulated
devices, which share the cores, a ratio tells of work and copies, not of a network.
"""

import argparse
import shlex
import sys
from unittest import mock

import jax
import numpy as np
from timing import percentiles
from train_step import BATCHES, Arm, our_arm, run_rounds

from jtok_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from jtok_jax.data.loader import make_batch, open_source
from jtok_jax.mesh import make_mesh, put_batch
from jtok_jax.model.placement import describe
from jtok_jax.model.transformer import Parallel
from jtok_jax.model_config import JtokConfig, ModelConfig
from jtok_jax.training import step


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kind", default="jtok_m", choices=("jtok", "jtok_m"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=16384)
    return parser.parse_args()


def make_config(arguments, kind: str, implementation: str = "auto") -> Config:
    dim = arguments.dim
    return Config(
        model=ModelConfig(
            vocab_size=arguments.vocab_size, model_dim=dim, ffn_dim=3 * dim, num_layers=4,
            compute_dtype="float32", jtok=JtokConfig(kind=kind, implementation=implementation),
        ),
        train=TrainConfig(batch_size=arguments.batch, seq_len=arguments.seq_len),
        data=DataConfig(source="synthetic"),
        mesh=MeshConfig(fsdp=jax.device_count(), table_columns="fsdp"),
    )  # fmt: skip


def main() -> None:
    arguments = parse()
    config, dense = make_config(arguments, arguments.kind), make_config(arguments, "none")
    mesh, source = make_mesh(config.mesh), open_source(config)
    print("command ", shlex.join(["python", *sys.argv]))
    print(f"devices  {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(describe(config, mesh), flush=True)
    batches = []
    for number in range(1, BATCHES + 1):
        batch = make_batch(source.sequences(number))
        batches.append((put_batch(mesh, batch.ids_BT), put_batch(mesh, batch.targets_BT)))
    arms: dict[str, Arm] = {"dense": our_arm(dense, mesh, batches[0])}
    arms["exchange"] = our_arm(config, mesh, batches[0])
    with mock.patch.object(step, "parallel_reads", return_value=Parallel({}, mesh)):
        # XLA would gather what a kernel of ours reads: it cannot split one.
        plain = make_config(arguments, arguments.kind, "xla")
        arms["gspmd"] = our_arm(plain, mesh, batches[0])
    losses = [float(arms[name].run(*batches[0]).loss) for name in ("exchange", "gspmd")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    run_rounds(arms, batches, arguments.rounds)
    print(f"\n{'arm':9}{'median ms':>10}  {'/ dense':21}{'/ gspmd':21}{'temp MiB':>8}")
    seconds = {name: np.array(arm.seconds) for name, arm in arms.items()}
    for name, arm in arms.items():
        ratios = [percentiles(seconds[name] / seconds[other]) for other in ("dense", "gspmd")]
        milliseconds = 1e3 * np.median(seconds[name])
        print(f"{name:9}{milliseconds:10.1f}  {ratios[0]:21}{ratios[1]:21}{arm.temp_mib:8.1f}")


if __name__ == "__main__":
    main()
