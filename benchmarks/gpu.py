# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""All that only a GPU can show: python benchmarks/gpu.py --wheels=FOLDER --out=FOLDER

Three groups, each below ten minutes: kernels, steps, tests. Each step of a group is a process with
a time limit. A group has one log in OUT, figures.jsonl has every figure, README.md the table.
Each line is on disk when it is printed. Started again, it does what has not succeeded yet with the
same sources.
docs/gpu.md has the steps with their estimates and what each message means.
"""

import argparse
import contextlib
import datetime
import errno
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import card
import summary
from card import ROOT

GROUPS = ("kernels", "steps", "tests")
GROUP_SECONDS = 570  # of the first one in a call from the start of the call
SET_UP_SECONDS = 30  # left of those by the limits of a group's steps
ENDED = re.compile(
    r"step (?P<name>\S+): (?P<how>.+) after (?P<seconds>\d+) s, sources (?P<sources>\S+)"
)
GOOD = "exit code 0"


class Step(NamedTuple):
    """A command after `python`, from the repository's folder."""

    name: str
    group: str
    command: str
    rehearsal: str  # the arguments that differ on a CPU; they come last, so they win
    estimate: int  # seconds on an H200; it starts if so much is left of its group
    limit: int  # seconds
    needs: int = 40  # GiB of the card
    memory: float = 0.9  # fraction of the card that each of its processes may take


TINY = "--dims=128 --tokens=8 --rows=13"
SIMULATED = "--implementation=mosaic_gpu:interpret"
BATCH = "--table_dtype=bfloat16 --batch=16 --seq_len=2048 --max_unique_ids=12000"
SMALL = "--config= --batch=2 --seq_len=32 --rounds=2 --max_unique_ids=0 --kinds=dense,jtok,jtok_m"
PYTEST = "-m pytest -p no:cacheprovider -p xdist.plugin"
DIMS = (768, 1024, 1536, 2048)
# Real shapes first: if a group runs out of time, the least is lost.
STEPS = (
    Step("ceilings", "kernels", "benchmarks/ceilings.py", "", 20, 40),
    Step("correctness", "kernels", "benchmarks/correctness.py",
         f"{TINY} {SIMULATED}", 50, 80),
    *(Step(f"kernels_{dim}", "kernels", f"benchmarks/kernels.py --dims={dim}",
           f"{TINY} --ids=zipf --rounds=1 --dtype=bfloat16 {SIMULATED}", 50, 60) for dim in DIMS),
    *(Step(f"variants_{dim}", "kernels", f"benchmarks/variants.py --dims={dim}",
           f"{TINY} --rounds=1 --interpret", 30, 44) for dim in DIMS),
    Step("dense_l", "steps", f"benchmarks/train_step.py --config=configs/dense_l.py {BATCH} "
         "--tables_optimizer=rowwise_adagrad --rounds=12", SMALL, 260, 350, needs=115, memory=0.95),
    Step("dense_s", "steps", f"benchmarks/train_step.py --config=configs/dense_s.py {BATCH} "
         "--rounds=30", SMALL, 120, 180),
    Step("kernel_tests", "tests", f"{PYTEST} -n 8 tests/test_modulate.py "
         "tests/test_row_optimizers.py", "-n 0 -k zero_rows", 180, 280, memory=0.1),
    Step("big_table", "tests", f"{PYTEST} tests/test_big_table.py", "", 30, 60),
    Step("generate", "tests", "benchmarks/generate.py --config=configs/dense_s.py --batches=1,16 "
         "--rounds=10", "--config= --batches=1 --length=8 --rounds=2", 110, 180),
)  # fmt: skip
NOT_REHEARSED = {f"{name}_{dim}" for name in ("kernels", "variants") for dim in DIMS[1:]}


class Interrupted(Exception):
    """A signal asked this process to end."""


class Log:
    """The log of a group; a line is on disk when `write` returns."""

    def __init__(self, path: pathlib.Path):
        self.file = path.open("a")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # said before, where the disk is full
            self.file.close()

    def write(self, line: str) -> None:
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def ended(out: pathlib.Path, group: str, sources: str) -> dict[str, tuple[str, int]]:
    """Return {step: (how it ended last, seconds)}; "cut off" if it only started.

    Args:
        sources: digest of the code; of a step that ran with other code, that is said too.
    """
    path, found = out / f"{group}.txt", {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        if line.startswith("step ") and line.endswith(" starts"):
            found[line.split()[1]] = ("cut off", 0)
        elif (match := ENDED.fullmatch(line)) is not None:
            other = "" if match["sources"] == sources else ", with other sources"
            found[match["name"]] = (match["how"] + other, int(match["seconds"]))
    return found


def execute(step: Step, words: list[str], log: Log, env: dict, limit: float) -> bool:
    """Run one step, its output line by line into the log; return whether it succeeded.

    All processes it has started end with it.
    """
    start = time.monotonic()
    log.write(f"step {step.name} starts")
    log.write(f"$ python {shlex.join(words)}   (at most {limit:.0f} s)")
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    late = threading.Event()
    timer = threading.Timer(limit, lambda: (late.set(), _kill(process)))
    timer.start()
    how = "ended by a signal"
    try:
        for line in process.stdout:
            log.write(line.rstrip("\n"))
        code = process.wait()
        how = f"stopped at its limit of {limit:.0f} s" if late.is_set() else f"exit code {code}"
    finally:
        timer.cancel()
        _kill(process)
        process.wait()
        process.stdout.close()
        taken = time.monotonic() - start
        log.write(f"step {step.name}: {how} after {taken:.0f} s, sources {env['SOURCES']}")
    return how == GOOD


def _kill(process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_group(
    group: str, out: pathlib.Path, env: dict, found: card.Card, head, rehearse, begun: float
) -> int:
    """Run the steps of one group that have not succeeded; return how many have not then.

    Args:
        begun: when its time began, by time.monotonic().
    """
    before = ended(out, group, env["SOURCES"])
    for name, (how, seconds) in before.items():
        print(f"step {name} before: {how} after {seconds} s", flush=True)
    missing = [
        step
        for step in STEPS
        if step.group == group and not (rehearse and step.name in NOT_REHEARSED)
        and before.get(step.name, ("", 0))[0] != GOOD
    ]  # fmt: skip
    failed = 0
    with Log(out / f"{group}.txt") as log:
        for line in head if missing else ():
            log.write(line)
        for step in missing:
            left = GROUP_SECONDS - (0 if rehearse else time.monotonic() - begun)
            if reason := obstacle(step, found, left):
                log.write(f"step {step.name}: skipped, {reason}, after 0 s, "
                          f"sources {env['SOURCES']}")  # fmt: skip
                failed += 1
                continue
            words = shlex.split(f"{step.command} {step.rehearsal if rehearse else ''}")
            more = {"FIGURES": str(out / "figures.jsonl"), "STEP": step.name}
            more["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(step.memory)
            limit = left if rehearse else min(step.limit, left)
            try:
                failed += not execute(step, words, log, env | more, limit)
            finally:
                write_summary(out, head, env["SOURCES"])
    return failed


def obstacle(step: Step, found: card.Card, left: float) -> str | None:
    """Return why a step cannot start, or None."""
    if found.free_gib < step.needs:
        return f"it needs {step.needs} GiB of the card and has {found.free_gib:.0f}"
    if left < step.estimate:
        return (f"it takes about {step.estimate} s and the group has {max(left, 0):.0f} left; "
                "start again for it")  # fmt: skip
    return None


def write_summary(out: pathlib.Path, head: list[str], sources: str) -> None:
    """Write README.md anew, whole or not at all."""
    steps = {step.name: f"python {step.command}" for step in STEPS}
    state = {}
    for group in GROUPS:
        state |= {name: (group, *how) for name, how in ended(out, group, sources).items()}
    part = out / ".README.md.part"
    figures = summary.read(out / "figures.jsonl", sources)
    part.write_text(summary.markdown(figures, head, steps, state))
    part.replace(out / "README.md")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=pathlib.Path, help="folder of wheels, made by --fetch")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results")
    parser.add_argument("--only", help=f"some of {','.join(GROUPS)}; default: all, in this order")
    parser.add_argument("--fetch", action="store_true", help="download the wheels, nothing else")
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU, tiny shapes")
    options = parser.parse_args()
    options.only = options.only.split(",") if options.only else list(GROUPS)
    if unknown := set(options.only) - set(GROUPS):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if not (options.wheels if options.fetch else options.out):
        parser.error("pass --wheels=FOLDER with --fetch, --out=FOLDER else")
    return options


def main() -> int:
    begun = time.monotonic()
    options = parse()
    if options.fetch:
        card.fetch(options.wheels)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return run(options, begun)
    except Interrupted as error:
        card.fail(f"{error}; finished steps stay. Start again with the same --out for the others.")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        card.fail(f"the disk of {options.out} is full. Make room and start again with the same "
                  "--out; finished steps stay.")  # fmt: skip


def _interrupt(number, frame):
    raise Interrupted(f"ended by {signal.Signals(number).name}")


def run(options, begun: float) -> int:
    """Check the machine, then run the groups; return how many steps have not succeeded."""
    found = card.stand_in() if options.rehearse else card.find_card()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    card.check_disk(out)
    with tempfile.TemporaryDirectory(prefix="jtok-gpu-") as site:
        site = pathlib.Path(site)
        if options.wheels:
            card.install(options.wheels.resolve(), site)
        commit, digest = card.sources(options.wheels)
        env = card.environment(site, found, options.rehearse) | {"SOURCES": digest}
        versions = card.check_packages(env, options.rehearse)
        now = datetime.datetime.now(datetime.UTC)
        head = [f"call     {now:%Y-%m-%d %H:%M} UTC", *found.lines]
        head += [f"software {versions}", f"code     commit {commit}, sources {digest}"]
        missing = 0
        for group in options.only:
            missing += run_group(group, out, env, found, head, options.rehearse, begun)
            begun = time.monotonic()
        write_summary(out, head, digest)
    print((out / "README.md").read_text(), flush=True)
    return min(missing, 100)


if __name__ == "__main__":
    sys.exit(main())
