# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Steps of Pattention beside a dense model of equal FLOPs, paired: python benchmarks/pattention.py

At the shapes of the quickstart. `ffn` replaces the feed-forward by 4 D slots, `all` every map by
3 D / 4 and 3 D slots: both have the parameters and FLOPs of the dense model, to some per cent.
Every round runs one step of each arm, in an order that rotates. A ratio is the median over rounds
of the ratio within a round (10th to 90th percentile).
"""

import argparse
import dataclasses
import shlex
import sys

import jax
import numpy as np
from timing import percentiles, record, say
from train_step import BATCHES, our_arm, run_rounds

from jtok_jax import flops
from jtok_jax.config import Config, DataConfig, TrainConfig
from jtok_jax.data.loader import make_batch, open_source
from jtok_jax.mesh import make_mesh, put_batch
from jtok_jax.model_config import ModelConfig, PattentionConfig


def models(remat: str) -> dict[str, ModelConfig]:
    """The arms."""
    dense = ModelConfig(compute_dtype="float32", remat=remat)
    dim = dense.model_dim
    own = {
        "ffn": PattentionConfig(kind="ffn", ffn_slots=4 * dim),
        "all": PattentionConfig(kind="all", slots=3 * dim // 4, ffn_slots=3 * dim),
    }
    return {"dense": dense} | {
        name: dataclasses.replace(dense, pattention=options) for name, options in own.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--remat", default="none")
    options = parser.parse_args()
    say(f"$ python {shlex.join(sys.argv)}\n{jax.__version__}, {jax.devices()[0].device_kind}")
    arms, work = {}, {}
    for name, model in models(options.remat).items():
        train = TrainConfig(batch_size=options.batch, seq_len=options.seq_len)
        config = Config(model=model, train=train, data=DataConfig(source="synthetic"))
        mesh, source = make_mesh(config.mesh), open_source(config)
        batches = [
            tuple(put_batch(mesh, x) for x in make_batch(source.sequences(step)))
            for step in range(1, BATCHES + 1)
        ]
        arms[name] = our_arm(config, mesh, batches[0])
        work[name] = flops.count(model, seq_len=options.seq_len)
    run_rounds(arms, batches, options.rounds)
    for name, arm in arms.items():
        ratio = percentiles(np.array(arm.seconds) / arms["dense"].seconds)
        share = work[name].train_flops / work["dense"].train_flops
        say(
            f"{name:6} {work[name].backbone:>10,} parameters, FLOPs {share:.3f} of dense, "
            f"temporaries {arm.temp_mib:7.1f} MiB, a step {ratio} of dense"
        )
        record(benchmark="pattention", arm=name, flops=share, ratio=str(ratio))


if __name__ == "__main__":
    main()
