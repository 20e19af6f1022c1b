# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Times of the table operations on whatever device there is: python benchmarks/kernels.py

Arms, forward and backward apart, paired in rounds whose order rotates:
  plain      what one would write: gather, autodiff, a dense gradient of the table
  segment    forward as plain; backward by rows, sorted jax.ops.segment_sum
  xla        jtok_kernels, implementation "xla"
  mosaic_gpu jtok_kernels on GPUs of compute capability 9.0 and newer

`GB/s` is the least traffic of the operation by the time, `of copy` that over the measured
bandwidth of copying an array. Ids are Zipf's (s = 1.07), uniform ones, or those of a prepared
corpus. Then the parts alone: plan, router, gather, updates of one layer. With --growth: times
against V and T as a plot.
"""

import argparse
import functools
import json
import pathlib
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jtok_kernels import (
    choose,
    jtok,
    jtok_m,
    lazy_adam,
    mix_rows,
    pack_rows,
    reference,
    row_plan,
    rowwise_adam,
    update_rows,
)

from jtok_jax.model.jtok import route

EPS, DEPTH_SCALE = 1e-6, 0.2
LAYERS = 2  # of the stack; one is used


def make_ids(kind: str, count: int, num_rows: int, seed: int) -> np.ndarray:
    """int32 [count] in [0, num_rows): "uniform", "zipf", or the folder of a prepared corpus."""
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return rng.integers(0, num_rows, count, dtype=np.int32)
    if kind == "zipf":
        weights = 1.0 / (np.arange(num_rows) + 2.7) ** 1.07
        ranked = rng.choice(num_rows, count, p=weights / weights.sum())
        return rng.permutation(num_rows)[ranked].astype(np.int32)
    return corpus_ids(kind, count, num_rows, seed)


def corpus_ids(folder: str, count: int, num_rows: int, seed: int) -> np.ndarray:
    from jtok_jax.config import Config, DataConfig, TrainConfig
    from jtok_jax.data.loader import open_source
    from jtok_jax.model_config import ModelConfig

    manifest = json.loads((pathlib.Path(folder) / "manifest.json").read_text())
    length, vocab = manifest["seq_len"], manifest["vocab_size"]
    if vocab > num_rows:
        raise SystemExit(f"{folder} has {vocab} entries; pass --rows of at least that many.")
    config = Config(
        model=ModelConfig(vocab_size=vocab),
        train=TrainConfig(batch_size=-(-count // length), seq_len=length, seed=seed),
        data=DataConfig(path=folder, verify="size"),
    )
    return open_source(config).sequences(1).reshape(-1)[:count].astype(np.int32)


# ------------------------------------------------------------------------------------- arms


def plain(kind, h, delta, stack, ids, choice, weights, scale):
    form = {"norm": "l2", "eps": EPS}
    if kind == "jtok":
        e = stack[1, ids].astype(jnp.float32)
        return reference.norm_add(h, delta, e, scale, depth_scale=None, **form)
    rows = stack[1, choice, ids[:, None]].astype(jnp.float32)
    e = reference.mix(rows, weights)
    return reference.norm_add(h, delta, e, scale, depth_scale=DEPTH_SCALE, **form)


def ours(implementation, kind, plan, h, delta, stack, ids, choice, weights, scale, rows=None):
    options = {"eps": EPS, "layer": 1, "plan": plan, "row_grads": rows}
    options["implementation"] = implementation
    if kind == "jtok":
        return jtok(h, delta, stack, ids, scale, **options)
    options["depth_scale"] = DEPTH_SCALE
    return jtok_m(h, delta, stack, ids, choice, weights, scale, **options)


def segment_backward(kind, plan, g, h, delta, stack, ids, choice, weights, scale):
    """Autodiff down to the gathered rows, then one sorted segment_sum."""
    order, num_unique = plan.order, plan.unique_U.size
    form = {"norm": "l2", "eps": EPS, "depth_scale": None if kind == "jtok" else DEPTH_SCALE}
    rows = stack[1, ids] if kind == "jtok" else stack[1, choice, ids[:, None]]
    mix = (lambda rows, _: rows) if kind == "jtok" else reference.mix
    f = lambda delta, rows, weights, scale: reference.norm_add(
        h, delta, mix(rows, weights), scale, **form
    )
    _, pull = jax.vjp(f, delta, rows.astype(jnp.float32), weights, scale)
    d_delta, d_rows, d_weights, d_scale = pull(g)
    if kind == "jtok":
        keys, values, total = order.place, d_rows, num_unique
    else:
        keys = (choice * num_unique + order.place[:, None]).reshape(-1)
        values, total = d_rows.reshape(-1, d_rows.shape[-1]), stack.shape[1] * num_unique
    by_key = jnp.argsort(keys)
    sums = jax.ops.segment_sum(values[by_key], keys[by_key], total, indices_are_sorted=True)
    return d_delta, sums, d_weights, d_scale


def held(implementation: str, stack: jax.Array) -> jax.Array:
    """The tables as the implementation wants them."""
    packed = implementation == "mosaic_tpu" and stack.dtype == jnp.bfloat16
    return pack_rows(stack) if packed else stack


def arms(kind: str, data: dict, implementations: list[str]):
    """{name: function of no arguments} of forward and of backward."""
    given, plan, g = data["given"], data["plan"], data["g"]
    h, stack = given[0], given[2]
    several = () if kind == "jtok" else (stack.shape[1],)
    rows = jnp.zeros((*several, plan.unique_U.size, h.shape[1]))

    def plain_backward(g, h, delta, stack, ids, choice, weights, scale):
        f = lambda *args: plain(kind, h, args[0], args[1], ids, choice, args[2], args[3])
        return jax.vjp(f, delta, stack, weights, scale)[1](g)

    def our_backward(name, plan, rows, g, h, delta, stack, ids, choice, weights, scale):
        f = lambda h, delta, weights, scale, rows: ours(
            name, kind, plan, h, delta, stack, ids, choice, weights, scale, rows
        )
        return jax.vjp(f, h, delta, weights, scale, rows)[1](g)

    run = lambda f, *args: functools.partial(jax.jit(f), *args)
    forward = {"plain": run(functools.partial(plain, kind), *given)}
    backward = {
        "plain": run(plain_backward, g, *given),
        "segment": run(functools.partial(segment_backward, kind), plan, g, *given),
    }
    for name in implementations:
        mine = *given[:2], held(name, stack), *given[3:]
        forward[name] = run(functools.partial(ours, name, kind), plan, *mine)
        backward[name] = run(functools.partial(our_backward, name), plan, rows, g, *mine)
    return forward, backward


def floor_bytes(kind: str, backward: bool, tokens: int, unique: int, data: dict, top_k: int) -> int:
    """Least traffic: every array the operation needs once, a row once per unique id."""
    h, _, stack = data["given"][:3]
    stream, row = h[0].nbytes, stack[0, 0].nbytes // stack.shape[-2]
    if kind == "jtok_m":
        row = stack[0, 0, 0].nbytes
    read_rows = tokens * (row if kind == "jtok" else top_k * row)
    if not backward:
        return tokens * 3 * stream + read_rows
    grads = unique * 4 * h.shape[1] * (1 if kind == "jtok" else stack.shape[1])
    if kind == "jtok":
        return tokens * 3 * stream + unique * row + grads
    return tokens * stream + min(read_rows, unique * stack.shape[1] * row) + grads


# ----------------------------------------------------------------------------------- timing


def paired(functions: dict, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every round by name; failures are shown and left out."""
    good = {}
    for name, function in functions.items():
        try:
            jax.block_until_ready(function())
            good[name] = function
        except Exception as error:
            print(f"    {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
    names, seconds = list(good), {name: [] for name in good}
    first = {name: _once(good[name], 1) for name in names}
    repeats = {name: int(np.clip(0.01 / first[name], 1, 50)) for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_once(good[name], repeats[name]))
    return {name: np.array(values) for name, values in seconds.items()}


def _once(function, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        out = function()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second of reading and writing an array of 512 MiB (64 MiB on a CPU)."""
    size = (64 if jax.default_backend() == "cpu" else 512) << 20
    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    seconds = paired({"copy": lambda: copy(x)}, rounds)["copy"]
    return 2 * size / float(np.median(seconds))


def make_data(kind, tokens, dim, num_rows, ids_kind, arguments) -> dict:
    dtype = jnp.dtype(arguments.dtype)
    keys = jax.random.split(jax.random.key(arguments.seed), 6)
    several = () if kind == "jtok" else (arguments.tables,)
    draw = lambda key, *shape: jax.random.normal(key, shape, dtype)
    stack = draw(keys[0], LAYERS, *several, num_rows, dim)
    ids = jnp.asarray(make_ids(ids_kind, tokens, num_rows, arguments.seed))
    choice = jnp.argsort(jax.random.uniform(keys[1], (tokens, arguments.tables)), axis=1)
    choice = choice[:, : arguments.top_k].astype(jnp.int32)
    weights = jax.random.uniform(keys[2], choice.shape)
    h, delta, g = (draw(key, tokens, dim) for key in keys[3:6])
    bound = None if arguments.safe_bound else tight_bound(ids)
    plan = jax.jit(functools.partial(row_plan, num_rows=num_rows, max_unique=bound))(ids)
    scale = jnp.ones(dim, jnp.float32)
    return {"given": (h, delta, stack, ids, choice, weights, scale), "plan": plan, "g": g}


def tight_bound(ids) -> int:
    """What one would pass as train.max_unique_ids: a tenth more than there are."""
    return int(1.1 * np.unique(np.asarray(ids)).size) + 1


def report(kind, tokens, dim, num_rows, ids_kind, arguments, implementations, bandwidth) -> dict:
    """Print the rows of one shape; medians by (direction, arm)."""
    data = make_data(kind, tokens, dim, num_rows, ids_kind, arguments)
    unique = int(np.sum(np.asarray(data["plan"].unique_U) < num_rows))
    found = {}
    for direction, functions in zip(
        ("forward", "backward"), arms(kind, data, implementations), strict=True
    ):
        seconds = paired(functions, arguments.rounds)
        least = floor_bytes(kind, direction == "backward", tokens, unique, data, arguments.top_k)
        best = min((name for name in seconds if not name.startswith("mosaic")), default=None,
                   key=lambda name: np.median(seconds[name]))  # fmt: skip
        for name, values in seconds.items():
            ratio = np.percentile(values / seconds[best], [10, 50, 90])
            rate = least / np.median(values)
            print(
                f"{kind:7}{direction:9}{dim:6}{tokens:8}{unique:8} {_short(ids_kind):9}{name:11}"
                f"{1e6 * np.median(values):11.1f}{rate / 1e9:9.1f}{100 * rate / bandwidth:8.1f}%"
                f"   {ratio[1]:6.2f} ({ratio[0]:.2f}-{ratio[2]:.2f}) {best}",
                flush=True,
            )
            found[direction, name] = float(np.median(values))
    return found


def report_rest(tokens, dim, num_rows, ids_kind, arguments, implementations) -> None:
    """The parts of a step one by one: plan, router, gather, and the update of one layer's rows."""
    data = make_data("jtok_m", tokens, dim, num_rows, ids_kind, arguments)
    h, _, stack, ids, choice, weights, _ = data["given"]
    unique = int(np.sum(np.asarray(data["plan"].unique_U) < num_rows))
    router = jax.random.normal(jax.random.key(0), (dim, arguments.tables))
    max_unique = data["plan"].unique_U.size
    parts = {
        "plan": lambda: make_plan(ids),
        "router": lambda: routed(h, router),
    }
    make_plan = jax.jit(functools.partial(row_plan, num_rows=num_rows, max_unique=max_unique))
    routed = jax.jit(functools.partial(route, bias_M=None, top_k=arguments.top_k))
    for name in implementations:
        gather = jax.jit(functools.partial(mix_rows, layer=1, implementation=name))
        parts[f"gather {name}"] = functools.partial(gather, held(name, stack), ids, choice, weights)
        for make in (lazy_adam, rowwise_adam):
            update = update_step(make, name, data)
            parts[f"{make.__name__} {name}"] = update
    for name, values in paired(parts, arguments.rounds).items():
        line = f"{name:22}{tokens:8}{unique:8} {_short(ids_kind):20}"
        print(f"{line}{1e6 * np.median(values):11.1f}", flush=True)


def update_step(make, implementation: str, data: dict):
    """A function that applies one step to the rows of one layer's tables, in place."""
    _, _, stack, _, choice, _, _ = data["given"]
    plan = data["plan"]
    grads = jnp.zeros((stack.shape[1], plan.unique_U.size, stack.shape[-1]))
    grads = grads.at[choice, plan.order.place[:, None]].set(1.0)  # as routed: some stay zero
    optimizer = make(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    key = jax.random.key(0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(table, state, grads, unique_U):
        options = {"step": jnp.int32(1), "learning_rate": jnp.float32(1e-3)}
        options |= {"rounding_key": key, "implementation": implementation}
        return update_rows(optimizer, table, state, unique_U, grads, **options)

    table = held(implementation, stack[1])
    state = [table, optimizer.init(table)]

    def step():
        state[:] = update(*state, grads, plan.unique_U)
        return state[0]

    return step


def _short(ids_kind: str) -> str:
    return pathlib.Path(ids_kind).name[:8]


def growth(arguments, implementations, bandwidth) -> None:
    """Time per token against V at fixed T and against T at fixed V, as a plot."""
    import matplotlib.pyplot as plt

    name, dim = implementations[-1], arguments.dims[0]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    rows = [1 << k for k in range(13, arguments.growth_rows.bit_length())]
    tokens = sorted(arguments.tokens)
    sweeps = [
        ("rows of a table V", rows, [(arguments.tokens[0], num_rows) for num_rows in rows]),
        ("tokens T", tokens, [(count, arguments.rows) for count in tokens]),
    ]
    for axis, (label, xs, shapes) in zip(axes, sweeps, strict=True):
        for direction in ("forward", "backward"):
            found = [
                report("jtok", t, dim, v, "zipf", arguments, [name], bandwidth)[direction, name] / t
                for t, v in shapes
            ]
            axis.plot(xs, 1e9 * np.array(found), "o-", label=direction)
        axis.set(xscale="log", yscale="log", xlabel=label)
    axes[0].set_ylabel("ns per token")
    axes[0].legend()
    figure.suptitle(f"jtok, {name}, D {dim}, {arguments.dtype}, {jax.devices()[0].device_kind}")
    figure.tight_layout()
    figure.savefig(arguments.growth, metadata={"Date": None})


def main() -> None:
    numbers = lambda text: [int(part) for part in text.split(",")]
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=numbers, default=[128] if on_cpu else [768, 1024, 2048])
    parser.add_argument("--tokens", type=numbers,
                        default=[1024, 4096] if on_cpu else [1024, 4096, 16384, 65536])  # fmt: skip
    parser.add_argument("--rows", type=int, default=8192 if on_cpu else 50304, help="V")
    parser.add_argument("--tables", type=int, default=5, help="E of JTok-M")
    parser.add_argument("--top_k", type=int, default=2, help="K of JTok-M")
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--ids", default="zipf,uniform", help="zipf, uniform, or a prepared folder")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--safe_bound", action="store_true", help="plans with room for T ids")
    parser.add_argument("--growth", help="FILE.svg: plot time per token against V and T instead")
    parser.add_argument("--growth_rows", type=int, default=1 << 20, help="largest V of the plot")
    arguments = parser.parse_args()

    on_tpu = jax.default_backend() == "tpu"
    words = on_tpu and arguments.dtype == "bfloat16"  # how a TPU holds such tables
    stored = jnp.dtype("uint32" if words else arguments.dtype)
    chosen = choose(None, dim=arguments.dims[0], dtype=stored)
    implementations = ["xla"] + [chosen.name] * (chosen.name != "xla")
    device = jax.devices()[0]
    print("command ", shlex.join(["python", *sys.argv]))
    print("device  ", device.device_kind, f"({device.platform}), jax {jax.__version__}")
    print("chosen  ", *chosen)
    bandwidth = copy_bandwidth(arguments.rounds)
    print(f"copy     {bandwidth / 1e9:.1f} GB/s, read and write")
    print(f"\n{'':16}{'D':>6}{'T':>8}{'unique':>8} {'ids':9}{'arm':11}{'us':>11}{'GB/s':>9}"
          f"{'of copy':>9}   time over the best of XLA (10th-90th percentile)")  # fmt: skip
    if arguments.growth:
        return growth(arguments, implementations, bandwidth)
    for ids_kind in arguments.ids.split(","):
        for dim in arguments.dims:
            for tokens in arguments.tokens:
                for kind in ("jtok", "jtok_m"):
                    report(kind, tokens, dim, arguments.rows, ids_kind, arguments,
                           implementations, bandwidth)  # fmt: skip
                report_rest(tokens, dim, arguments.rows, ids_kind, arguments, implementations)


if __name__ == "__main__":
    main()
