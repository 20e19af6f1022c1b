# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What more chips cost, by the plan: python benchmarks/cost_curve.py --plot=cost-curve.svg

17B-A2B with 43.6B table parameters on v5p pods of 8 to 8,192 chips, 16,384 tokens a chip and step.
Up to 64 chips split weights and tables (fsdp, then expert); more of them are copies along data.
An estimate at the rates and shares jtok_jax/planning states, without latencies or stragglers;
nothing here was measured.
"""

import argparse
import runpy

from jtok_jax.config_dict import from_config_dict
from jtok_jax.planning.advice import changed
from jtok_jax.planning.report import make_plan
from jtok_jax.planning.topology import CHIPS, GIB, Topology

CHIP_COUNTS = [2**power for power in range(3, 14)]


def plan_of(chips: int) -> dict:
    config = from_config_dict(runpy.run_path("configs/moe_17b_a2b.py")["get_config"]())
    fsdp, expert = min(chips, 16), min(max(chips // 16, 1), 4)
    change = {
        "mesh.fsdp": fsdp, "mesh.expert": expert, "train.batch_size": 8 * chips,
        "evaluation.batch_size": 8 * chips, "model.attention": "chunked",
        "mesh.table_rows": "expert" if expert > 1 else "",
    }  # fmt: skip
    return make_plan(changed(config, change), Topology(f"v5p, {chips}", CHIPS["v5p"], (chips,)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="also draw it into this file")
    arguments = parser.parse_args()
    plans = [plan_of(chips) for chips in CHIP_COUNTS]
    print(f"{'chips':>6} {'GiB':>7} {'sent, GiB':>10} {'step, s':>15} {'MFU, %':>10}")
    for chips, plan in zip(CHIP_COUNTS, plans, strict=True):
        (low, high), mfu = plan["estimate"]["step_seconds"], plan["estimate"]["mfu"]
        print(
            f"{chips:>6} {plan['memory']['total'] / GIB:>7.1f} {sent(plan):>10.1f} "
            f"{low:>7.3f}-{high:.3f} {100 * mfu[0]:>6.0f}-{100 * mfu[1]:.0f}"
        )
    if arguments.plot:
        draw(plans, arguments.plot)


def sent(plan: dict) -> float:
    """GiB that one device sends in a step."""
    return sum(one["size"] for one in plan["collectives"]) / GIB


def draw(plans: list[dict], path: str) -> None:
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, sharex=True, figsize=(7, 8))
    band = lambda axes, name: axes.fill_between(
        CHIP_COUNTS,
        [plan["estimate"][name][0] for plan in plans],
        [plan["estimate"][name][1] for plan in plans],
        color="#9db8d2",
    )
    band(top, "step_seconds")
    top.set_ylabel("seconds a step")
    top.set_ylim(bottom=0)
    top.set_title(
        "17B-A2B with JTok-M on v5p, 16,384 tokens a chip: an estimate\n"
        "upper and lower edge: no collective hidden, or all of them",
        loc="left",
    )
    band(middle, "mfu")
    middle.set_ylabel("MFU")
    middle.set_ylim(0, 0.7)
    totals = [plan["memory"]["total"] / GIB for plan in plans]
    bottom.plot(CHIP_COUNTS, totals, color="#33608c", label="held by a chip")
    bottom.plot(
        CHIP_COUNTS, [sent(plan) for plan in plans], color="#c98b2b", label="sent in a step"
    )
    bottom.axhline(
        plans[0]["memory"]["device"] / GIB, color="#888888", linestyle=":", label="memory"
    )
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("GiB")
    bottom.legend(frameon=False, loc="lower right", ncols=3)
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(CHIP_COUNTS, [f"{count:,}" for count in CHIP_COUNTS])
    bottom.set_xlabel("chips")
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
