# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Time of one training step against a hand-written one, paired: python benchmarks/train_step.py

Arms: `plain` (benchmarks/plain_step.py) and the step of train.py for `dense`, `jtok` and `jtok_m`
at the shapes of configs/quickstart.py, on the one device there is.

1. dense and plain start from the same parameters and must give the same loss for 3 steps
2. every round runs one step of each arm, in an order that rotates
3. a ratio is the median over rounds of the ratio within a round (10th to 90th percentile)

Everything is printed when it is known. An arm that does not fit is named; the others go on.
"""

import argparse
import dataclasses
import functools
import pathlib
import runpy
import shlex
import sys
import time

import flax
import jax
import jaxlib
import numpy as np
import optax
from plain_step import Plain, init_state, make_step
from timing import device_line, exit_code, left_out, percentiles, record, say

from jtok_jax.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TableOptimizerConfig,
    TrainConfig,
)
from jtok_jax.config_dict import from_config_dict
from jtok_jax.data.loader import check_unique, make_batch, open_source
from jtok_jax.mesh import make_mesh, put_batch
from jtok_jax.model_config import JtokConfig, ModelConfig
from jtok_jax.training import state as training_state
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.step import jit_train_step

KINDS = {"dense": "none", "jtok": "jtok", "jtok_m": "jtok_m"}
BATCHES = 8  # distinct batches, taken in turn
TARGET = 1.10  # dense / plain


class Arm:
    """A compiled step and its state."""

    def __init__(self, step, state, ids, targets):
        self.state, self.seconds = state, []
        start = time.perf_counter()
        self.step = step.lower(state, ids, targets).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temp_mib = self.step.memory_analysis().temp_size_in_bytes / 2**20

    def run(self, ids, targets):
        """One step, waited for; its metrics."""
        start = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self.step(self.state, ids, targets))
        self.seconds.append(time.perf_counter() - start)
        return metrics


def make_config(arguments, kind: str, dtype: str) -> Config:
    """Of a file in configs/ with other tables, or at the shapes of the quickstart."""
    train = TrainConfig(
        batch_size=arguments.batch,
        seq_len=arguments.seq_len,
        max_unique_ids=arguments.max_unique_ids,
    )
    tables = TableOptimizerConfig(kind=arguments.tables_optimizer)
    if arguments.config:
        given = from_config_dict(runpy.run_path(arguments.config)["get_config"]())
        jtok = dataclasses.replace(given.model.jtok, kind=kind, table_dtype=arguments.table_dtype)
        model = dataclasses.replace(given.model, compute_dtype=dtype, jtok=jtok)
        source = DataConfig(source="synthetic")
        optimizer = dataclasses.replace(given.optimizer, tables=tables)
        return dataclasses.replace(
            given, model=model, train=train, data=source, optimizer=optimizer
        )
    return Config(
        model=ModelConfig(
            compute_dtype=dtype, jtok=JtokConfig(kind=kind, table_dtype=arguments.table_dtype)
        ),
        optimizer=OptimizerConfig(tables=tables),
        schedule=ScheduleConfig(kind="constant", warmup_fraction=0.0),
        train=train,
        data=DataConfig(source="synthetic"),
    )


def our_arm(config: Config, mesh, batch) -> Arm:
    """The step as train.py builds it."""
    optimizer = make_optimizer(config)
    step = jit_train_step(config, optimizer, mesh)
    return Arm(step, training_state.init_state(config, optimizer, mesh), *batch)


def plain_arm(config: Config, params: dict, batch) -> Arm:
    """The hand-written step, from a copy of `params` of a dense model."""
    model, optimizer = config.model, config.optimizer
    cudnn = model.compute_dtype == "bfloat16" and jax.default_backend() == "gpu"
    plain = Plain(
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_size,
        rope_base=model.rope_base,
        norm_eps=model.norm_eps,
        z_loss=config.train.z_loss,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        clip_norm=optimizer.clip_norm,
        dtype=model.compute_dtype,
        attention="cudnn" if cudnn else "xla",
    )
    return Arm(make_step(plain), init_state(plain_layout(params)), *batch)


def plain_layout(params: dict) -> dict:
    """Our parameters under the names and shapes of plain_step, as new arrays."""
    ours = {name.removeprefix("blocks/"): np.asarray(value) for name, value in params.items()}
    flat = lambda x: x.reshape(*x.shape[:2], -1)  # [L, D, heads, H] -> [L, D, heads * H]
    join = lambda *names: np.concatenate([flat(ours[name]) for name in names], axis=-1)
    out = ours["attention/out"]
    layout = {
        "embed": ours["embed"],
        "head": ours["head"],
        "final_norm": ours["final_norm"],
        "attn_norm": ours["attention/norm"],
        "qkv": join("attention/query", "attention/key", "attention/value"),
        "out": out.reshape(out.shape[0], -1, out.shape[-1]),
        "ffn_norm": ours["ffn/norm"],
        "gate_up": join("ffn/gate", "ffn/up"),
        "down": ours["ffn/down"],
    }
    return {name: jax.numpy.array(value, copy=True) for name, value in layout.items()}


def check_equal(config: Config, mesh, batches) -> None:
    """Stop unless dense and plain give the same losses, in float32 and full precision."""
    model = dataclasses.replace(config.model, compute_dtype="float32")
    config = dataclasses.replace(config, model=model)
    with jax.default_matmul_precision("highest"):
        dense = our_arm(config, mesh, batches[0])
        plain = plain_arm(config, dense.state.params, batches[0])
        ours = [float(dense.run(*batch).loss) for batch in batches]
        theirs = [float(plain.run(*batch)[0]) for batch in batches]
    say("losses   dense", *[f"{loss:.6f}" for loss in ours])
    say("         plain", *[f"{loss:.6f}" for loss in theirs])
    if not np.allclose(ours, theirs, rtol=0, atol=1e-4):
        raise SystemExit("dense and plain do not compute the same step")


def run_rounds(arms: dict[str, Arm], batches, rounds: int) -> None:
    """One step of every arm a round, after two that are not counted; prints each round."""
    for name in list(arms):
        built = built_or_named(
            f"{name}, first steps", lambda name=name: warm_up(arms[name], batches)
        )
        if built is None:
            del arms[name]
    names = list(arms)
    for index in range(rounds if names else 0):
        shift = index % len(names)
        order = names[shift:] + names[:shift]
        backwards = index // len(names) % 2  # so that an arm follows each of its neighbours
        for name in reversed(order) if backwards else order:
            arms[name].run(*batches[index % len(batches)])
        taken = "  ".join(f"{name} {1e3 * arms[name].seconds[-1]:.1f}" for name in names)
        say(f"round {index + 1:3}, ms   {taken}")


def warm_up(arm: Arm, batches) -> Arm:
    for batch in batches[:2]:
        arm.run(*batch)
    arm.seconds.clear()
    return arm


def built_or_named(name: str, build):
    """`build()`; None where it fails, after saying so. Too little memory is the usual reason."""
    try:
        return build()
    except jax.errors.JaxRuntimeError as error:
        left_out(name, error)
        return None


def build_arms(configs: dict[str, Config], mesh, batch) -> dict[str, Arm]:
    """Compile every arm and say what it takes."""
    arms = {}
    for name, config in configs.items():
        arm = built_or_named(name, functools.partial(our_arm, config, mesh, batch))
        if arm is not None:
            arms[name] = arm
            state = sum(x.nbytes for x in jax.tree.leaves(arm.state)) / 2**20
            say(f"compiled {name:8}{arm.compile_seconds:6.1f} s, state {state:9.1f} MiB, "
                f"temporaries {arm.temp_mib:9.1f} MiB")  # fmt: skip
    return arms


def report(arms: dict[str, Arm], arguments) -> None:
    """Print and record the table of all rounds."""
    say(f"\n{arguments.rounds} rounds; ratios: median (10th-90th percentile) of rounds")
    say(f"{'arm':8}{'median ms':>10}  {'/ plain':21}{'/ dense':21}{'temp MiB':>8}")
    seconds = {name: np.array(arm.seconds) for name, arm in arms.items()}
    config = pathlib.Path(arguments.config or "quickstart").stem
    for name, arm in arms.items():
        to_plain = percentiles(seconds[name] / seconds.get("plain", np.nan))
        ratios = seconds[name] / seconds.get("dense", np.nan)
        milliseconds = 1e3 * float(np.median(seconds[name]))
        say(f"{name:8}{milliseconds:10.1f}  {to_plain:21}{percentiles(ratios):21}"
            f"{arm.temp_mib:8.1f}")  # fmt: skip
        record(table="steps", config=config, arm=name, ms=milliseconds,
               ratio=float(np.median(ratios)), mib=arm.temp_mib)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--config", help="file in configs/; without the hand-written step then")
    kinds = {"type": lambda text: text.split(","), "default": [*KINDS]}
    parser.add_argument("--kinds", **kinds, help="of dense,jtok,jtok_m; all are held at once")
    parser.add_argument("--table_dtype", default="float32")
    parser.add_argument("--tables_optimizer", default="lazy_adam", help="optimizer.tables.kind")
    parser.add_argument("--max_unique_ids", type=int, default=0, help="train.max_unique_ids")
    parser.add_argument("--compute_dtype", help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--frozen", action="store_true", help="tables train alone, but in dense")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if jax.device_count() != 1:
        raise SystemExit("This compares steps on one device; hide the others.")
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = arguments.compute_dtype or default
    configs = {arm: make_config(arguments, KINDS[arm], dtype) for arm in arguments.kinds}
    if arguments.frozen:
        freeze = lambda one: dataclasses.replace(one, optimizer=dataclasses.replace(
            one.optimizer, frozen="backbone"))  # fmt: skip
        configs = {arm: one if arm == "dense" else freeze(one) for arm, one in configs.items()}
    dense = make_config(arguments, "none", dtype)
    model = dense.model

    say("command ", shlex.join(["python", *sys.argv]))
    say("device  ", device_line())
    say(f"versions jaxlib {jaxlib.__version__}, flax {flax.__version__}, optax {optax.__version__}")
    say(f"shapes   batch {arguments.batch} x {arguments.seq_len}, vocab {model.vocab_size}, "
        f"dim {model.model_dim}, layers {model.num_layers}, heads {model.num_heads}, "
        f"ffn {model.ffn_dim}, compute {dtype}")  # fmt: skip

    mesh = make_mesh(dense.mesh)
    source = open_source(dense)
    batches = []
    for step in range(1, BATCHES + 1):
        batch = make_batch(source.sequences(step))
        for config in configs.values():
            check_unique(np.unique(batch.ids_BT).size, config, step)
        batches.append((put_batch(mesh, batch.ids_BT), put_batch(mesh, batch.targets_BT)))
    with_plain = "dense" in arguments.kinds and not arguments.config
    if with_plain:
        check_equal(dense, mesh, batches[:3])

    arms = build_arms(configs, mesh, batches[0])
    if with_plain:
        arms = {"plain": plain_arm(dense, arms["dense"].state.params, batches[0])} | arms
    run_rounds(arms, batches, arguments.rounds)
    report(arms, arguments)
    if with_plain:
        say(f"target: dense / plain at most {TARGET:.2f}")
    return exit_code()


if __name__ == "__main__":
    sys.exit(main())
