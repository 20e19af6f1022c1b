# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Times of the table operations on whatever device there is: python benchmarks/kernels.py

Arms, forward and backward apart, in rounds whose order rotates:
  plain      gather and autodiff, with a dense gradient of the table
  segment    backward by sorted segment sums, in the order that the plan holds
  atomics    backward by one scatter-add into the rows of the step
  xla        jtok_kernels, implementation "xla"; its backward on a GPU is left out, because it takes
             half a minute to compile
  mosaic_gpu jtok_kernels on GPUs of compute capability 9.0 and newer
Then the plan of a step, and the update of the rows of one layer in place.

`GB/s` is the least traffic of the operation (`cases.floor_bytes`) by the time. `of copy` is that
over the bandwidth of copying random data, measured first. Calls run inside one program over several
input sets (`timing.in_turn`): Python is not measured. Kernels come last (`baselines_first`).
"""

import argparse
import functools
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
from baselines import BACKWARD, plain_forward
from cases import (
    KINDS,
    Case,
    Shape,
    backward_of,
    floor_bytes,
    forward_of,
    make_cases,
    unique_rows,
)
from jtok_kernels import choose, lazy_adam, pack_rows, row_plan, rowwise_adagrad, update_rows
from jtok_kernels.choose import backend
from timing import (
    baselines_first,
    calls_in_turn,
    compiled,
    copy_bandwidth,
    device_line,
    exit_code,
    in_turn,
    on_gpu,
    overhead,
    percentiles,
    record,
    say,
    time_cases,
)

OPTIMIZERS = {
    "lazy_adam": lambda: lazy_adam(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0),
    "rowwise_adagrad": lambda: rowwise_adagrad(eps=1e-8, weight_decay=0.0),
}
STATE_BYTES = {"lazy_adam": 16, "rowwise_adagrad": 0}  # read and written, an entry of a row


def arms(direction: str, implementations: list[str]) -> dict:
    """Return {name: function of a case}."""
    if direction == "forward":
        found, call = {"plain": plain_forward}, forward_of
    else:
        found, call = dict(BACKWARD), backward_of
    for name in implementations:
        if not (name == "xla" and direction == "backward" and on_gpu()):
            found[name] = functools.partial(_as_stored, call, name)
    return found


def _as_stored(call, name: str, case: Case):
    return call(backend(name), case)


def as_stored(name: str, case: Case) -> Case:
    """Return the case with its table as the implementation wants it."""
    packed = name.startswith("mosaic_tpu") and case.table.dtype == jnp.bfloat16
    return case._replace(table=pack_rows(case.table)) if packed else case


def report(kind: str, shape: Shape, ids_kind: str, options, bandwidth: float) -> None:
    """Print and record the times of one shape."""
    cases = make_cases(kind, shape, ids_kind, options.seed)
    unique = unique_rows(cases[0])
    for direction in ("forward", "backward"):
        programs = {
            name: in_turn(function, [as_stored(name, case) for case in cases])
            for name, function in arms(direction, options.implementations).items()
        }
        functions = compiled(programs, f"{kind} {direction}")
        least = np.mean([floor_bytes(case, direction) for case in cases])
        for name, values, ratios, best in baselines_first(
            functions, calls_in_turn(cases), options.rounds
        ):
            share = 100 * least / np.median(values) / bandwidth
            say(
                f"{kind:7}{direction:9}{shape.dim:6}{shape.tokens:8}{unique:8} "
                f"{_short(ids_kind):9}{name:11}{1e6 * np.median(values):11.1f}"
                f"{least / np.median(values) / 1e9:9.1f}{share:8.1f}%   "
                f"{percentiles(ratios)} {best}"
            )
            record(
                table="kernels", kind=kind, direction=direction, dim=shape.dim,
                tokens=shape.tokens, ids=_short(ids_kind), arm=name,
                us=1e6 * float(np.median(values)), share=float(share),
                ratio=float(np.median(ratios)),
            )  # fmt: skip


def report_parts(shape: Shape, ids_kind: str, options, bandwidth: float) -> None:
    """Print and record the time of a plan, and of updating the rows of one layer of JTok-M."""
    cases = make_cases("jtok_m", shape, ids_kind, options.seed, count=2)
    room, rows = cases[0].plan.unique_U.size, unique_rows(cases[0])
    make_plan = functools.partial(row_plan, num_rows=shape.rows, max_unique=room)

    def tell(name: str, values, ratios=None, best=None, least: float = np.nan):
        share = 100 * least / np.median(values) / bandwidth
        say(
            f"{name:32}{shape.dim:6}{shape.tokens:8}{rows:8} {_short(ids_kind):9}"
            f"{1e6 * np.median(values):11.1f}"
            + (f"{share:17.1f}%   {percentiles(ratios)} {best}" if best else "")
        )
        record(
            table="parts", name=name, dim=shape.dim, tokens=shape.tokens, ids=_short(ids_kind),
            us=1e6 * float(np.median(values)), share=float(share),
            ratio=float(np.median(ratios)) if best else None,
        )  # fmt: skip

    plans = time_cases({"plan": make_plan}, [case.ids for case in cases], options.rounds)
    for name, values in plans.items():
        tell(name, values)
    updates = compiled(updaters(cases[0], options.implementations), in_place=True)
    for optimizer in OPTIMIZERS:
        functions = {name: updates[name] for name in updates if name.startswith(optimizer)}
        row = 4 + 2 * cases[0].table.dtype.itemsize + STATE_BYTES[optimizer]
        for found in baselines_first(functions, 1, options.rounds):
            tell(*found, least=rows * shape.dim * row)


def updaters(case: Case, implementations: list[str]) -> dict:
    """Return {name: (program, arrays)} of updates of the rows of a case, for `compiled` in place.

    A time is that of one update in a loop of them. Each starts from the table and state that the
    last one left, so neither is copied.
    """
    count, dim = case.plan.unique_U.size, case.h.shape[1]
    used = jnp.zeros((case.table.shape[0], count, 1))
    used = used.at[case.choice, case.plan.order.place[:, None]].set(1.0)  # the others stay zero
    grads = used * jax.random.normal(jax.random.key(0), (1, count, dim))
    programs = {}
    for name in implementations:
        if not name.startswith("mosaic_tpu"):
            for kind, make in OPTIMIZERS.items():
                arrays = case.table, make().init(case.table), case.plan.unique_U, grads
                arrays = jax.tree.map(jnp.copy, arrays)  # each program has its own
                programs[f"{kind} {name}"] = functools.partial(_update, make(), name), arrays
    return programs


def _update(optimizer, implementation: str, turns, arrays):
    def turn(index, arrays):
        table, state, unique_U, grads = arrays
        options = {"step": index + 1, "learning_rate": jnp.float32(1e-3)}
        options |= {"rounding_key": jax.random.key(0), "implementation": implementation}
        held = update_rows(optimizer, table, state, unique_U, grads, **options)
        return *held, unique_U, grads

    return jax.lax.fori_loop(0, turns, turn, arrays)


def _short(ids_kind: str) -> str:
    return pathlib.Path(ids_kind).name[:8]


def parse() -> argparse.Namespace:
    numbers = lambda text: [int(part) for part in text.split(",")]
    on_cpu, gpu = jax.default_backend() == "cpu", on_gpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dims", type=numbers, default=[768, 1024, 1536, 2048] if gpu else [128]
    )  # fmt: skip
    parser.add_argument("--tokens", type=numbers, default=[32768, 4096] if gpu else [4096])
    parser.add_argument("--rows", type=int, default=8192 if on_cpu else 50304, help="V")
    parser.add_argument("--tables", type=int, default=5, help="E of JTok-M")
    parser.add_argument("--top_k", type=int, default=2, help="K of JTok-M")
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument(
        "--ids", default="zipf,permuted", help="of zipf, permuted, uniform, a prepared folder"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", help="beside xla; default: what this device takes")
    return parser.parse_args()


def main() -> int:
    options = parse()
    words = jax.default_backend() == "tpu" and options.dtype == "bfloat16"  # as a TPU holds them
    stored = jnp.dtype("uint32" if words else options.dtype)
    chosen = choose(options.implementation, dim=options.dims[0], dtype=stored)
    options.implementations = ["xla"] + [chosen.name] * (chosen.name != "xla")
    say("command ", shlex.join(["python", *sys.argv]))
    say("device  ", device_line())
    say("chosen  ", *chosen)
    bandwidth = copy_bandwidth()
    say(f"copy     {bandwidth / 1e9:.1f} GB/s, read and written")
    say(f"nothing  {1e6 * overhead():.1f} us, added to every call by the measurement")
    say(f"\n{'':16}{'D':>6}{'T':>8}{'rows':>8} {'ids':9}{'arm':11}{'us':>11}{'GB/s':>9}"
        f"{'of copy':>9}   time over the best of XLA (10th-90th percentile)")  # fmt: skip
    for dim in options.dims:
        for tokens in options.tokens:
            shape = Shape(tokens, dim, options.rows, options.tables, options.top_k, options.dtype)
            for ids_kind in options.ids.split(","):
                for kind in KINDS:
                    report(kind, shape, ids_kind, options, bandwidth)
            report_parts(shape, options.ids.split(",")[0], options, bandwidth)
    return exit_code()


if __name__ == "__main__":
    sys.exit(main())
