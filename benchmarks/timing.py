# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Times of device programs: many calls in one program, arms taking turns, ceilings of the device.

A program calls a function on several input sets in turn, so that inputs do not stay in a cache.
Barriers tie each call to the one before: none is removed, merged with another or moved.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

SECONDS = 0.02  # about what one sample takes
MOST_TURNS = 50
FIRST_JAX = (0, 11)  # older ones drop barriers before they fuse
CALLS = 16  # at least so many in a turn on a GPU
_KEPT = {}  # programs of `compiled` by label, name and shapes
_LOST = []  # arms that were left out


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def record(**figure) -> None:
    """Append a figure to the file that FIGURES names, on disk when this returns; NaN as null."""
    if path := os.environ.get("FIGURES"):
        unknown = lambda x: isinstance(x, float) and not math.isfinite(x)
        of = {"step": os.environ.get("STEP", ""), "sources": os.environ.get("SOURCES", "")}
        of |= {name: None if unknown(value) else value for name, value in figure.items()}
        with open(path, "a") as file:
            file.write(json.dumps(of, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def say(*words) -> None:
    print(*words, flush=True)


def in_turn(function, cases):
    """Return (program(turns, cases), cases); one turn calls `function` on every case.

    On a GPU a turn goes over the cases until it has `CALLS` calls: the host waits between turns.
    """
    function = jax.jit(function)  # traced and lowered once for all cases

    def program(turns, cases):
        def turn(_, total):
            for case in cases * (calls_in_turn(cases) // len(cases)):
                case, total = jax.lax.optimization_barrier((case, total))
                total += _first_entries(jax.lax.optimization_barrier(function(case)))
            return total

        return jax.lax.fori_loop(0, turns, turn, jnp.float32(0))

    return program, tuple(cases)


def calls_in_turn(cases) -> int:
    """Return the calls of a turn, a multiple of the number of cases."""
    return len(cases) * (-(-CALLS // len(cases)) if on_gpu() else 1)


def overhead(rounds: int = 7) -> float:
    """Return the seconds that `in_turn` itself adds to a call; times include it."""
    cases = [jnp.ones(8)] * 2
    return float(np.median(time_cases({"nothing": lambda x: x[:1]}, cases, rounds)["nothing"]))


def _first_entries(tree) -> jax.Array:
    """The sum of one entry of every array: XLA drops what a barrier passes on and nobody uses."""
    return sum(leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(tree))


def left_out(name: str, error: Exception) -> None:
    """Say in one line which arm failed and why; end the process if the device is of no use now."""
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    say(f"    {name} failed and is left out: {type(error).__name__}: {reason}")
    record(failed=name, reason=reason)
    _LOST.append(name)
    if not _answers():
        raise SystemExit(f"The device does not answer since {name} failed; what follows would not.")


def _answers() -> bool:
    """Whether the device still computes: after an illegal access in a kernel it never does."""
    try:
        return float(jnp.ones(8).sum()) == 8
    except jax.errors.JaxRuntimeError:
        return False


def exit_code() -> int:
    """Name the arms that were left out; return 1 if there are any, else 0."""
    if _LOST:
        say(f"\nleft out: {', '.join(dict.fromkeys(_LOST))}")
    return int(bool(_LOST))


def compiled(programs: dict, label: str = "", in_place: bool = False) -> dict:
    """Compile {name: (program, cases)}; return {name: function of the number of turns}.

    An arm that does not lower or compile is named and left out.

    Args:
        in_place: a program returns its cases, changed: they are donated, and the next call starts
            from what the last one returned.
        label: programs of one label and name are the same, so that cases of other values but equal
            shapes are not compiled again. "": nothing is kept.
    """
    lowered, functions = {}, {}
    key = lambda name: (label, name, str(jax.tree.map(jax.typeof, programs[name][1])))
    for name, (program, cases) in programs.items():
        if not label or key(name) not in _KEPT:
            with _named(name):
                donated = (1,) if in_place else ()
                lowered[name] = jax.jit(program, donate_argnums=donated).lower(jnp.int32(1), cases)
        else:
            functions[name] = _caller(_KEPT[key(name)], cases, in_place)
    with concurrent.futures.ThreadPoolExecutor(8 if on_gpu() else 1) as pool:
        waiting = {name: pool.submit(one.compile) for name, one in lowered.items()}
        for name, future in waiting.items():
            with _named(name):
                executable = future.result()
                functions[name] = _caller(executable, programs[name][1], in_place)
                if label:
                    _KEPT[key(name)] = executable
    return {name: functions[name] for name in programs if name in functions}


def _caller(executable, cases, in_place: bool):
    def call(turns):
        nonlocal cases
        found = jax.block_until_ready(executable(jnp.int32(turns), cases))
        if in_place:
            cases = found
        return found

    return call


@contextlib.contextmanager
def _named(name: str):
    """Say which arm failed and why, and go on."""
    try:
        yield
    except Exception as error:
        left_out(name, error)


def paired(functions: dict, calls: int, rounds: int) -> dict[str, np.ndarray]:
    """Return {name: seconds a call in every round}; the order of the arms rotates.

    An arm that fails is named and left out, with the rounds that it has finished.

    Args:
        functions: {name: function of the number of turns}.
        calls: calls of the operation in one turn.
    """
    turns, seconds = {}, {}
    for name, function in functions.items():
        with _named(name):
            function(1)
            turns[name] = int(np.clip(SECONDS / _seconds(function, 1), 1, MOST_TURNS))
            seconds[name] = []
    for index in range(rounds):
        names = list(seconds)
        shift = index % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            with _named(name):
                taken = _seconds(functions[name], turns[name])
                seconds[name].append(taken / (turns[name] * calls))
                continue
            del seconds[name]
    return {name: np.array(values) for name, values in seconds.items()}


def baselines_first(functions: dict, calls: int, rounds: int):
    """Yield (name, seconds, ratios to the fastest baseline, its name) of every arm; see `paired`.

    Kernels run after all others have been yielded: one that breaks the device takes no other time
    with it. They take turns with the fastest of the others.
    """
    ours = {name: function for name, function in functions.items() if "mosaic" in name}
    others = {name: function for name, function in functions.items() if name not in ours}
    seconds = paired(others, calls, rounds)
    best = min(seconds, key=lambda name: np.median(seconds[name]), default=None)
    for name, values in seconds.items():
        yield name, values, values / seconds[best], best
    again = {best: functions[best]} if best and ours else {}
    seconds = paired(again | ours, calls, rounds)
    for name in [name for name in ours if name in seconds]:
        yield name, seconds[name], seconds[name] / seconds.get(best, np.nan), best


def _seconds(function, turns: int) -> float:
    start = time.perf_counter()
    function(turns)
    return time.perf_counter() - start


def time_cases(functions: dict, cases, rounds: int) -> dict[str, np.ndarray]:
    """Return seconds a call by name and round, of functions of one case."""
    programs = {name: in_turn(function, cases) for name, function in functions.items()}
    return paired(compiled(programs), calls_in_turn(cases), rounds)


def percentiles(ratios: np.ndarray) -> str:
    """Return "median (10th-90th percentile)"."""
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    return f"{middle:5.3f} ({low:5.3f}-{high:5.3f})"


# --------------------------------------------------------------------------------- ceilings


def copy_bandwidth(size: int | None = None, rounds: int = 7) -> float:
    """Return bytes a second, read and written, of copying `size` bytes of random data.

    size: default 8 GB on a GPU, 64 MB elsewhere.
    """
    if jax.version.__version_info__ < FIRST_JAX:
        wanted = ".".join(map(str, FIRST_JAX))
        raise SystemExit(
            f"These times need JAX {wanted} or newer; this is {jax.__version__}, which computes "
            "only the entries that a program uses."
        )
    size = size or (8 * 10**9 if on_gpu() else 64 * 10**6)
    # The simplest copy that XLA does not hand to another engine: one addition an entry.
    words = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    seconds = time_cases({"copy": lambda words: words + jnp.uint32(1)}, [words], rounds)
    return 2 * words.nbytes / float(np.median(seconds["copy"]))


def matmul_flops(size: int | None = None, rounds: int = 7) -> float:
    """Return operations a second of a square matmul of random bfloat16 (8192 on a GPU)."""
    size = size or (8192 if on_gpu() else 256)
    draw = lambda key: jax.random.normal(key, (size, size), jnp.bfloat16)
    case = draw(jax.random.key(0)), draw(jax.random.key(1))
    seconds = time_cases({"matmul": lambda case: case[0] @ case[1]}, [case], rounds)
    return 2 * size**3 / float(np.median(seconds["matmul"]))


def device_line() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind} ({device.platform}), jax {jax.__version__}"
