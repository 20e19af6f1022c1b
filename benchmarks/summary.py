# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table that benchmarks/gpu.py leaves: figures beside their goals. Standard library only."""

import json
import pathlib

SHARES = {"forward": 80, "backward": 65}  # % of copy bandwidth, T 32768, D >= 1024
STEPS = {("dense_l", "jtok"): 2, ("dense_l", "jtok_m"): 5,
         ("dense_s", "jtok"): 4, ("dense_s", "jtok_m"): 8}  # fmt: skip


def read(path: pathlib.Path, sources: str) -> list[dict]:
    """Return all figures of these sources; of the same the last, and no line that was cut off."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            figure = json.loads(line)
        except json.JSONDecodeError:
            continue
        if figure.get("sources") != sources:
            continue
        values = ("value", "us", "share", "ratio", "error", "good", "ms", "low", "high", "mib")
        key = tuple((name, x) for name, x in sorted(figure.items()) if name not in values)
        found[key] = figure
    return list(found.values())


def shown(value: float | None, form: str = ".0f") -> str:
    """Return a figure as text, "unknown" where there is none."""
    return "unknown" if value is None else format(value, form)


def over(ratio: float | None) -> str:
    """Return what a ratio is above 1, in percent."""
    return shown(None if ratio is None else 100 * (ratio - 1), "+.1f")


def markdown(figures: list[dict], head: list[str], commands: dict, state: dict) -> str:
    """Return README.md: the machine, goals, parts, variants, and how each step ended.

    Args:
        figures: of `read`.
        commands: {step: command}.
        state: {step: (group, how it ended, seconds)}.
    """
    of = lambda table: [figure for figure in figures if figure.get("table") == table]
    lines = [
        "# Results",
        "",
        *(f"- {line}" for line in head),
        "",
        "This is the last call; each log has the heads of its own calls.",
        "",
        "## Goals",
        "",
    ]
    lines += ["| what | measured | goal |", "|---|---|---|"]
    lines += [f"| {x['name']} | {shown(x['value'])} | |" for x in of("ceilings")]
    if checks := of("correctness"):
        wrong = [f"{x['name']} {x['arm']} D {x['dim']}" for x in checks if not x["good"]]
        lines.append(f"| results that agree with float64 | {len(checks) - len(wrong)} of "
                     f"{len(checks)} {', '.join(wrong)} | all |")  # fmt: skip
    for x in of("kernels"):
        if x["arm"].startswith("mosaic") and x["tokens"] != 4096:
            goal = f"{SHARES[x['direction']]}" if x["dim"] >= 1024 else ""
            lines.append(f"| {x['kind']} {x['direction']}, D {x['dim']}, T {x['tokens']}, "
                         f"{x['ids']}, % of copy | {shown(x['share'])} | {goal} |")  # fmt: skip
    for x in of("steps"):
        if x["arm"] != "dense":
            goal = STEPS.get((x["config"], x["arm"]))
            lines.append(f"| step {x['config']} {x['arm']} over dense, % | {over(x['ratio'])} | "
                         f"{goal or ''} |")  # fmt: skip
    for x in of("generate"):
        if x["arm"] != "dense":
            lines.append(f"| {x['phase']} of batch {x['batch']}, {x['arm']} over dense, % | "
                         f"{over(x['ratio'])} | |")  # fmt: skip
    lines += ["", "## Plans and updates of one layer", ""]
    lines += ["| what | us | % of copy | over XLA, % |", "|---|---|---|---|"]
    for x in of("parts"):
        what = f"{x['name']}, D {x['dim']}, T {x['tokens']}"
        share, ratio = (shown(x["share"]), over(x["ratio"])) if x["name"] != "plan" else ("", "")
        lines.append(f"| {what} | {shown(x['us'])} | {share} | {ratio} |")
    lines += ["", "## Variants, time over shipped", "", "| what | ratio |", "|---|---|"]
    for x in of("variants"):
        if x["arm"] != "shipped":
            what = f"{x['kind']} {x['direction']}, D {x['dim']}, {x['arm']}"
            lines.append(f"| {what} | {shown(x['ratio'], '.3f')} |")
    lines += ["", "## Steps", "", "| step | command | ended | seconds |", "|---|---|---|---|"]
    for name, command in commands.items():
        group, how, seconds = state.get(name, ("", "not run", 0))
        link = f"[{name}]({group}.txt)" if group else name
        lines.append(f"| {link} | `{command}` | {how} | {seconds} |")
    redone = {name for name, (_, how, _) in state.items() if how == "exit code 0"}
    failed = [f"- {x['step']}, {x['failed']}: {x['reason']}" for x in figures
              if "failed" in x and x["step"] not in redone]  # fmt: skip
    return "\n".join([*lines, *(["", "## Left out", "", *failed] if failed else [])]) + "\n"
