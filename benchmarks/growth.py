# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Grown models beside those trained from scratch: python benchmarks/growth.py --data=FOLDER

A TokenFormer that gets half as many slots more, and a JTok-M that gets two tables a layer more.
Every run but the small one has the FLOPs of the grown one, or begins anew as it does:

    small   the small model;
    grown   goes on from it, larger;
    anew    controls that do not grow: the small model, and the large one, go on from themselves;
    whole   the large model from scratch, in one schedule.

Rates and initial values are those that docs/results/systems chose. Runs that go on read another
order of the data. Every run is `train.py` with a workdir of its own: stopped, the same command
goes on. OUTPUT gets losses against total FLOPs, for all seeds that are done.
"""

import argparse
import csv
import dataclasses
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
from jtok_jax.study.trainer import commit

RATE = "optimizer.learning_rate"
COMMON = {
    "model.compute_dtype": "float32", "train.batch_size": 16, "train.seq_len": 256,
    "evaluation.batch_size": 16, "evaluation.max_sequences": 512, "evaluation.every": 10_000,
    "checkpoint.every": 100, "checkpoint.keep": 1,
}  # fmt: skip
SLOTS = ("model.pattention.slots", "model.pattention.ffn_slots")
JTOK = ("model.jtok.num_tables", "model.jtok.top_k")
JTOK_M = {
    "model.jtok.norm": "l2", "model.jtok.mixture_scale_init": 1.0, "model.jtok.router_bias": True,
    "optimizer.tables.kind": "lazy_adam", "optimizer.tables.learning_rate_multiplier": 10.0,
}  # fmt: skip
FAMILIES = {  # config, fields of all; of the small and the large one; what grows
    "tokenformer": (
        "configs/arms/tokenformer.py", {"model.init_std": 128**-0.5, RATE: 6e-3},
        dict(zip(SLOTS, (64, 256), strict=True)), dict(zip(SLOTS, (96, 384), strict=True)),
        Growth(slots=96, ffn_slots=384),
    ),
    "jtok_m": (
        "configs/arms/jtok_m.py", JTOK_M | {RATE: 3e-3}, dict(zip(JTOK, (2, 1), strict=True)),
        dict(zip(JTOK, (4, 3), strict=True)), Growth(jtok_tables=4),
    ),
}  # fmt: skip
ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: FLOPs of all training so far, losses by step, loss of validation."""

    workdir: pathlib.Path
    spent: np.ndarray
    losses: np.ndarray
    val_loss: float


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains runs of one family and seed in folders `runs`/FAMILY-SEED-NAME."""

    options: argparse.Namespace
    family: str
    seed: int

    def folder(self, name: str) -> pathlib.Path:
        return self.options.runs / f"{self.family}-{self.seed}-{name}"

    def scratch(self, name: str, size: dict[str, object], steps: int) -> Run:
        """Train a model from its initial values."""
        config, fields, *_ = FAMILIES[self.family]
        own = {"train.steps": steps, "train.seed": self.seed}
        return self._train(name, config, COMMON | fields | size | own, before=0.0)

    def onward(self, name: str, start: Run, model: pathlib.Path) -> Run:
        """Train `model` with a new schedule, on another order of the data, after `start`."""
        fields = COMMON | FAMILIES[self.family][1]
        own = {key: value for key, value in fields.items() if not key.startswith("model.")}
        own |= {"train.steps": self.options.steps, "train.seed": 100 + self.seed}
        own["schedule.kind"] = "cosine"
        return self._train(name, f"configs/pretrained.py:{model}", own, before=start.spent[-1])

    def _train(self, name: str, config: str, fields: dict[str, object], before: float) -> Run:
        workdir = self.folder(name)
        self.options.runs.mkdir(parents=True, exist_ok=True)
        with workdir.with_suffix(".commits").open("a") as file:
            file.write(commit(ROOT) + "\n")
        fields = fields | {"data.path": self.options.data}
        words = [f"--config.{key}={value}" for key, value in fields.items()]
        command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *words]
        subprocess.run(command, check=True, cwd=ROOT)
        config = from_config_dict(json.loads((workdir / "config.json").read_text()))
        tokens = config.train.batch_size * config.train.seq_len
        of_step = tokens * flops.count(config.model, seq_len=config.train.seq_len).train_flops
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        records = [one for one in map(json.loads, lines) if "loss" in one]
        steps, losses = np.array([(one["step"], one["loss"]) for one in records]).T
        return Run(workdir, before + of_step * steps, losses, records[-1]["val_loss"])


def train_all(trainer: Trainer) -> dict[str, Run]:
    """Train the runs of a family and seed by name."""
    *_, small, large, growth = FAMILIES[trainer.family]
    steps, found = trainer.options.steps, {}
    start = found["small"] = trainer.scratch("small", small, steps)
    grown = trainer.folder("grown-start")
    if not grown.exists():
        grow(str(start.workdir), grown, growth)
    end = found["grown"] = trainer.onward("grown", start, grown)
    found["small, begun anew"] = trainer.onward("small-anew", start, start.workdir)
    each = (end.spent[-1] - start.spent[-1]) / steps  # FLOPs of a step of the large one
    whole = round(end.spent[-1] / each)
    first = trainer.scratch("large-first", large, whole - steps)
    found["large, begun anew"] = trainer.onward("large-anew", first, first.workdir)
    found["large, one schedule"] = trainer.scratch("large", large, whole)
    return found


def draw(axis, runs: dict[str, list[Run]]) -> None:
    """Draw losses of training, means over seeds, against all FLOPs spent."""
    for label, of_seeds in runs.items():
        losses = np.mean([one.losses for one in of_seeds], axis=0)
        smooth = np.convolve(losses, np.ones(9) / 9, mode="valid")
        end = np.mean([one.val_loss for one in of_seeds])
        axis.plot(of_seeds[0].spent[4:-4], smooth, label=f"{label}: {end:.3f}")
    axis.set(xlabel="training FLOPs, all", ylabel="training loss, nats/token")
    axis.legend(title="validation at the end", fontsize="small")
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--data", required=True, help="folder of jtok_jax.prepare, vocabulary 4,096")
    option("--runs", type=pathlib.Path, default=pathlib.Path("runs/growth"))
    option("--output", type=pathlib.Path, default=pathlib.Path("docs/results/growth"))
    option("--steps", type=int, default=400, help="before growing, and after")
    option("--seeds", default="1,2", help="commas between")
    options = parser.parse_args()
    options.runs, options.data = options.runs.resolve(), pathlib.Path(options.data).resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    seeds = [int(one) for one in options.seeds.split(",")]
    figure, rows = new_figure(11, 4.5), []
    for axis, family in zip(figure.subplots(1, 2), FAMILIES, strict=True):
        found: dict[str, list[Run]] = {}
        for seed in seeds:
            for label, run in train_all(Trainer(options, family, seed)).items():
                found.setdefault(label, []).append(run)
                commits = run.workdir.with_suffix(".commits").read_text().split()[0]
                spent = f"{run.spent[-1]:.4e}"
                rows.append(
                    (family, label, seed, len(run.losses), spent, f"{run.val_loss:.5f}", commits)
                )
                say(*rows[-1])
        draw(axis, found)
        axis.set_title(f"{family}, {len(seeds)} seeds")
    save(figure, options.output / "growth.svg")
    with (options.output / "growth.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "run", "seed", "steps", "training_flops", "val_loss", "commit"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
