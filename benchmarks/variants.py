# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Variants of the GPU kernels against what ships, in one process: python benchmarks/variants.py

`shipped` is `Tuning()` with pieces as the plan has them. Each other arm changes one thing. Arms
take turns; a ratio is the median over rounds of the time over `shipped` within a round.
"""

import argparse
import functools
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
from cases import KINDS, Case, Shape, backward_of, forward_of, make_cases
from jtok_kernels.mosaic_gpu import MosaicGpu
from jtok_kernels.mosaic_gpu_block import Tuning
from timing import device_line, exit_code, on_gpu, percentiles, record, say, time_cases

FORWARD = {"bulk_forward": False, "auto_barriers": True}
BACKWARD = {"delta_first": False, "shared_rows": False, "auto_barriers": True}
BLOCKS = (396, 528, 792, 1056)
ORDERS = ("by row", "by size")
BEFORE = Tuning(False, False, False, auto_barriers=True, blocks=1056)  # pieces by row
PIECES = ("piece_run", "piece_start", "piece_size", "piece_slot")


def with_pieces(case: Case, order: str) -> Case:
    """Return the case with the pieces of its plan in another order.

    by row: as the rows of the step stand; what is no piece comes last.
    by size: large pieces first, else by row.
    """
    held = case.plan.order
    by_row = jnp.lexsort((held.piece_start, held.piece_run))
    if order == "by size":
        by_row = by_row[jnp.argsort(-held.piece_size[by_row], stable=True)]
    moved = {name: getattr(held, name)[by_row] for name in PIECES}
    return case._replace(plan=case.plan._replace(order=held._replace(**moved)))


def forward_arms(interpret: bool) -> dict:
    arms = {"shipped": Tuning(), "before": BEFORE}
    arms |= {f"{name}={value}": Tuning(**{name: value}) for name, value in FORWARD.items()}
    return {
        name: functools.partial(forward_of, MosaicGpu(interpret, tuning))
        for name, tuning in arms.items()
    }


def backward_arms(interpret: bool) -> dict:
    """Return {name: function of {order of pieces: case}}."""
    tunings = {"shipped": Tuning()}
    tunings |= {f"{name}={value}": Tuning(**{name: value}) for name, value in BACKWARD.items()}
    tunings |= {f"blocks={count}": Tuning(blocks=count) for count in BLOCKS}
    call = lambda tuning, order: lambda by: backward_of(MosaicGpu(interpret, tuning), by[order])
    arms = {name: call(tuning, "shipped") for name, tuning in tunings.items()}
    arms["before"] = call(BEFORE, "by row")
    return arms | {f"pieces {order}": call(Tuning(), order) for order in ORDERS}


def report(kind: str, shape: Shape, options) -> None:
    """Print and record every variant of one shape."""
    cases = make_cases(kind, shape, options.ids, seed=0)
    orders = [
        {"shipped": case} | {order: with_pieces(case, order) for order in ORDERS} for case in cases
    ]
    simulated = options.interpret
    for direction, functions, given in (
        ("forward", forward_arms(simulated), cases),
        ("backward", backward_arms(simulated), orders),
    ):
        seconds = time_cases(functions, given, options.rounds)
        for name, values in seconds.items():
            ratio = percentiles(values / seconds["shipped"]) if "shipped" in seconds else ""
            us = 1e6 * float(np.median(values))
            say(f"{kind:7}{direction:9}{shape.dim:6}{shape.tokens:8} {name:20}{us:11.1f}   {ratio}")
            record(
                table="variants", kind=kind, direction=direction, dim=shape.dim, arm=name, us=us,
                ratio=us / 1e6 / float(np.median(seconds.get("shipped", np.nan))),
            )  # fmt: skip


def main() -> int:
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=numbers, default=[768, 1024, 1536, 2048])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=50304, help="V")
    parser.add_argument("--ids", default="zipf")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--interpret", action="store_true", help="simulate the kernels on a CPU")
    options = parser.parse_args()
    if not (on_gpu() or options.interpret):
        raise SystemExit(
            f"The variants are kernels for GPUs, and this is a {jax.default_backend()}: pass "
            "--interpret to simulate them."
        )
    say("command ", shlex.join(["python", *sys.argv]))
    say("device  ", device_line())
    say(
        f"\n{'':16}{'D':>6}{'T':>8} {'arm':20}{'us':>11}   time over shipped (10th-90th percentile)"
    )
    for dim in options.dims:
        for kind in KINDS:
            report(kind, Shape(options.tokens, dim, options.rows), options)
    return exit_code()


if __name__ == "__main__":
    sys.exit(main())
