# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Grown models beside those trained from scratch: python benchmarks/growth.py --data=FOLDER

A TokenFormer that gets half as many slots more, and a JTok-M that gets two tables a layer more.
Runs of each: the small one; the grown one, which goes on from it with a new optimizer, with its
moments, or with these and a lower rate; the large one from scratch, with the FLOPs and with the
steps of both. Where these are the same within 1% it is one run. Rates and initial values are those
that docs/results/systems chose. Every run is `train.py` with a workdir of its own: stopped, the
same command goes on. OUTPUT gets losses against total FLOPs.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys

import numpy as np
from timing import say

from jtok_jax import flops
from jtok_jax.config_dict import from_config_dict
from jtok_jax.grow import Growth, grow
from jtok_jax.study.plots import new_figure, save

RATE = "optimizer.learning_rate"
COMMON = {
    "model.compute_dtype": "float32", "train.batch_size": 16, "train.seq_len": 256,
    "train.seed": 1, "evaluation.batch_size": 16, "evaluation.max_sequences": 512,
    "evaluation.every": 10_000, "checkpoint.every": 100, "checkpoint.keep": 1, RATE: 3e-3,
}  # fmt: skip
SLOTS = ("model.pattention.slots", "model.pattention.ffn_slots")
JTOK = ("model.jtok.num_tables", "model.jtok.top_k")
JTOK_M = {
    "model.jtok.norm": "l2", "model.jtok.mixture_scale_init": 1.0, "model.jtok.router_bias": True,
    "optimizer.tables.kind": "lazy_adam", "optimizer.tables.learning_rate_multiplier": 10.0,
}  # fmt: skip
FAMILIES = {  # config, fields of all; of the small and the large one; what grows
    "tokenformer": (
        "configs/arms/tokenformer.py", {"model.init_std": 128**-0.5},
        dict(zip(SLOTS, (64, 256), strict=True)), dict(zip(SLOTS, (96, 384), strict=True)),
        Growth(slots=96, ffn_slots=384),
    ),
    "jtok_m": (
        "configs/arms/jtok_m.py", JTOK_M, dict(zip(JTOK, (2, 1), strict=True)),
        dict(zip(JTOK, (4, 3), strict=True)), Growth(jtok_tables=4),
    ),
}  # fmt: skip

GROWN = {  # folder, fields
    "grown": ("grown", {}),
    "grown, with moments": ("grown-on", {"init_moments": True}),
    "the same, a third of the rate": ("grown-slow", {"init_moments": True, RATE: 1e-3}),
}


def run(options, name: str, config: str, fields: dict[str, object]) -> pathlib.Path:
    """Train to the end, or go on; return the workdir."""
    workdir = options.runs / name
    fields = fields | {"data.path": options.data}
    words = [f"--config.{key}={value}" for key, value in fields.items()]
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *words]
    subprocess.run(command, check=True)
    return workdir


def curve(workdir: pathlib.Path, before: float = 0.0) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (total FLOPs, training losses) by step, and the loss of validation at the end."""
    config = from_config_dict(json.loads((workdir / "config.json").read_text()))
    tokens = config.train.batch_size * config.train.seq_len
    of_step = tokens * flops.count(config.model, seq_len=config.train.seq_len).train_flops
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [one for one in map(json.loads, lines) if "loss" in one]
    steps, losses = np.array([(one["step"], one["loss"]) for one in records]).T
    return before + of_step * steps, losses, records[-1]["val_loss"]


def family(options, name: str) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Train the runs; return their curves."""
    config, common, small, large, growth = FAMILIES[name]
    fields, found = COMMON | common, {}
    steps = {"train.steps": options.steps}
    start = run(options, f"{name}-small", config, fields | small | steps)
    found["small"] = curve(start)
    grown = options.runs / f"{name}-grown-moments"
    if not grown.exists():
        grow(str(start), grown, growth, moments=True)
    own = {key: value for key, value in fields.items() if not key.startswith("model.")}
    own |= steps | {"schedule.kind": "cosine", "train.seed": 2}  # 1 would read the same again
    for label, (workdir, changes) in GROWN.items():
        after = run(options, f"{name}-{workdir}", f"configs/pretrained.py:{grown}", own | changes)
        found[label] = curve(after, before=found["small"][0][-1])
    total = found["grown"][0][-1]
    large_of = lambda label, steps: curve(
        run(options, f"{name}-{label}", config, fields | large | {"train.steps": steps})
    )
    both = 2 * options.steps
    whole = large_of("steps", both)
    affordable = round(total / whole[0][0])
    if affordable > 0.99 * both:
        found["from scratch, same steps and FLOPs"] = whole
    else:
        found["from scratch, same steps"] = whole
        found["from scratch, same FLOPs"] = large_of("flops", affordable)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--data", required=True, help="folder of jtok_jax.prepare, vocabulary 4,096")
    option("--runs", type=pathlib.Path, default=pathlib.Path("runs/growth"))
    option("--output", type=pathlib.Path, default=pathlib.Path("docs/results/growth"))
    option("--steps", type=int, default=400, help="before growing, and after")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    figure, rows = new_figure(11, 4.5), []
    for axis, name in zip(figure.subplots(1, 2), FAMILIES, strict=True):
        for label, (spent, losses, end) in family(options, name).items():
            smooth = np.convolve(losses, np.ones(9) / 9, mode="valid")
            axis.plot(spent[4:-4], smooth, label=f"{label}: {end:.3f}")
            rows.append((name, label, f"{spent[-1]:.4e}", f"{end:.5f}"))
            say(*rows[-1])
        axis.set(title=name, xlabel="training FLOPs, all", ylabel="training loss, nats/token")
        axis.legend(title="validation at the end", fontsize="small")
        axis.grid(alpha=0.3)
    save(figure, options.output / "growth.svg")
    with (options.output / "growth.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "run", "training_flops", "val_loss"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
