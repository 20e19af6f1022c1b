# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python benchmarks/compare_runs.py NAME=WORKDIR ... [--plot=FILE.svg]: runs side by side.

Prints final validation loss and bits per byte of each run against the first, and with --plot (needs
matplotlib: pip install -e '.[plot]') draws the training losses, averaged over 20 steps.
"""

import argparse
import json
import pathlib


def read(workdir: str) -> list[dict]:
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown table; the first run is the baseline of the differences."""
    rows = [
        "| run | steps | val loss, nats/token | difference | bits/byte |",
        "|---|---|---|---|---|",
    ]
    base = None
    for name, records in runs.items():
        last = [record for record in records if "val_loss" in record][-1]
        base = last["val_loss"] if base is None else base
        rows.append(
            f"| {name} | {last['step']} | {last['val_loss']:.4f} | {last['val_loss'] - base:+.4f} "
            f"| {last['val_bpb']:.4f} |"
        )
    return "\n".join(rows)


def plot(runs: dict[str, list[dict]], path: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, records in runs.items():
        losses = [record["loss"] for record in records if record.get("loss")]
        windows = [losses[i : i + 20] for i in range(0, len(losses), 20)]
        means = [sum(window) / len(window) for window in windows]
        (line,) = axes.plot([20 * i + 10 for i in range(len(means))], means, label=name)
        evaluated = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        axes.plot(*zip(*evaluated[1:], strict=True), "o", color=line.get_color())
    axes.set(xlabel="step", ylabel="nats per token", title="training loss (dots: validation)")
    axes.set_ylim(top=7)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
    parser.add_argument("--plot", help="file to draw into")
    options = parser.parse_args()
    runs = {name: read(workdir) for name, workdir in (run.split("=", 1) for run in options.runs)}
    print(table(runs))
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
