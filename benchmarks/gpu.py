# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""All that only a GPU can show, as one command: python benchmarks/gpu.py --out=docs/results/h100

Kernel tests compiled, then the benchmarks, each a process of its own with a time limit, in order of
what one would least like to miss; half an hour on an H100 at most. OUT gets NAME.txt of each, whose
last line tells how it ended, and README.md, a table of them. Started again it does what has not
succeeded yet.
"""

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENDED = re.compile(r"exit code (?P<code>-?\d+|stopped) after (?P<seconds>\d+) s on (?P<where>.*)")


class Run(NamedTuple):
    """A command after `python`, from the repository's folder."""

    name: str
    command: str
    limit: int  # seconds
    memory: float = 0.95  # fraction of the card that a process takes


BIG = "--table_dtype=bfloat16 --batch=16 --seq_len=2048 --max_unique_ids=12000"
RUNS = (
    Run("tests", "-m pytest -q -n 4 tests/test_modulate.py tests/test_row_optimizers.py", 400, 0.2),
    Run("kernels", "benchmarks/kernels.py --ids=zipf --dims=1024,2048 --tokens=4096,65536", 400),
    Run("step_small", "benchmarks/train_step.py --batch=64 --seq_len=1024", 150),
    Run("step_s", f"benchmarks/train_step.py --config=configs/dense_s.py {BIG}", 200),
    # At 1B one kind fills 80 GB: compiled, dense 53 GiB, JTok 73, JTok-M with rowwise_adagrad 77.
    Run("step_l_dense", f"benchmarks/train_step.py --config=configs/dense_l.py {BIG} --kinds=dense",
        150),
    Run("step_l_jtok", f"benchmarks/train_step.py --config=configs/dense_l.py {BIG} --kinds=jtok",
        150),
    Run("generate", "benchmarks/generate.py --config=configs/dense_s.py --rounds=10", 200),
    Run("big_table", "-m pytest -q tests/test_big_table.py", 150),
)  # fmt: skip


def execute(run: Run, log: pathlib.Path, where: str) -> None:
    """Output and errors go to `log`: first the command, last how it ended, as in `ENDED`.

    A command over its limit is ended with all processes it has started.
    """
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cuda,cpu",  # tests would take the CPU
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(run.memory),
    }
    start = time.perf_counter()
    with log.open("w") as output:
        print(f"$ python {run.command}", file=output, flush=True)
        process = subprocess.Popen(
            [sys.executable, *shlex.split(run.command)], cwd=ROOT, env=environment,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=run.limit)
        except subprocess.TimeoutExpired:
            code = "stopped"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.perf_counter() - start
        print(f"exit code {code} after {seconds:.0f} s on {where}", file=output)


def ended(log: pathlib.Path) -> re.Match | None:
    """How a run ended that was not cut off; None if it has not."""
    lines = log.read_text().splitlines() if log.exists() else []
    return ENDED.fullmatch(lines[-1]) if lines else None


def summary(out: pathlib.Path) -> str:
    """Markdown, a line a run."""
    lines = ["| run | command | exit code | seconds | on |", "|---|---|---|---|---|"]
    for run in RUNS:
        if found := ended(out / f"{run.name}.txt"):
            name = f"[{run.name}]({run.name}.txt)"
            lines.append(
                f"| {name} | `python {run.command}` | " + " | ".join(found.groups()) + " |"
            )
    return "\n".join(lines) + "\n"


def place() -> str:
    """Device, JAX and commit, found by other processes: this one must not hold the card."""
    probe = "import jax as j; print(j.default_backend(), j.devices()[0].device_kind, j.__version__)"
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found, commit = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for command in ([sys.executable, "-c", probe], words)
    )
    platform, *kind, version = found.split() or ("no devices", "")
    if platform != "gpu":
        raise SystemExit(
            f"There is no GPU that JAX can use here (python -m jtok_jax.doctor): {platform}."
        )
    return f"{' '.join(kind)}, jax {version}, commit {commit or 'unknown'}"


def main() -> int:
    names = [run.name for run in RUNS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument(
        "--only", help=f"some of {','.join(names)}; default: what has not succeeded"
    )
    arguments = parser.parse_args()
    out = arguments.out
    chosen = arguments.only.split(",") if arguments.only else names
    if unknown := set(chosen) - set(names):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    where = place()
    out.mkdir(parents=True, exist_ok=True)
    for run in RUNS:
        log = out / f"{run.name}.txt"
        done = ended(log)
        if run.name not in chosen or (done and done["code"] == "0" and not arguments.only):
            continue
        print(f"{run.name}, at most {run.limit} s", flush=True)
        execute(run, log, where)
        print("\n".join(log.read_text().splitlines()[-25:]), "\n", flush=True)
        (out / "README.md").write_text(summary(out))
    print(summary(out))
    return sum(not (found := ended(out / f"{name}.txt")) or found["code"] != "0" for name in chosen)


if __name__ == "__main__":
    sys.exit(main())
