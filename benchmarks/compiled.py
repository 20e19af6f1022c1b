# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Print what a compiler makes of the GPU kernels, before and after: python benchmarks/compiled.py

Nothing is executed and no GPU is needed: pip install -e '.[aot]' nvidia-cuda-nvdisasm, and ptxas of
CUDA 13 on the PATH. Columns:

  registers   of a thread, as ptxas says; a block has 128 threads
  blocks      that the registers let a multiprocessor hold at once
  barriers    in the loop over tokens; of a forward kernel and an update, in the whole kernel
  in flight   loads of rows issued before the first wait for one of them, of all in that code

With --steps instead: the launches of a training step, and how often a layer runs each kernel.

A bulk copy counts as one load, a vector load of a row as one for each of its instructions.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jtok_kernels import lazy_adam, row_plan, rowwise_adagrad
from jtok_kernels.form import Form
from jtok_kernels.mosaic_gpu import MosaicGpu
from jtok_kernels.mosaic_gpu_block import REGISTERS, THREADS, Tuning
from jtok_kernels.mosaic_gpu_update import update_kernel
from jtok_kernels.row_optimizers import RowGrads, Scalars

from jtok_jax.config_dict import from_config_dict
from jtok_jax.mesh import AUTO, AXES
from jtok_jax.planning.advice import changed
from jtok_jax.planning.compiled import absent_devices, compile_step, lacks
from jtok_jax.planning.hlo import parse, runs
from jtok_jax.planning.topology import parse_topology

BEFORE = Tuning(False, False, False, auto_barriers=True, blocks=1056)
TOKENS, ROWS, LAYERS, TABLES, TOP_K = 4096, 50304, 2, 5, 2
shape = jax.ShapeDtypeStruct


class Kernel(NamedTuple):
    """Figures that the compiled code of one kernel states."""

    registers: int
    blocks: int
    barriers: int
    in_flight: int
    loads: int


def functions(gpu: MosaicGpu, dim: int) -> dict:
    """{name: (function, its arguments)} of a forward, a backward and an update kernel."""
    form, mixed = Form(None, "l2", 1e-6), Form(0.2, "l2", 1e-6)
    stream, ids = shape((TOKENS, dim), jnp.bfloat16), shape((TOKENS,), jnp.int32)
    table = shape((LAYERS, ROWS, dim), jnp.bfloat16)
    tables = shape((LAYERS, TABLES, ROWS, dim), jnp.bfloat16)
    layer, scale = shape((), jnp.int32), shape((dim,), jnp.float32)
    choice, weights = shape((TOKENS, TOP_K), jnp.int32), shape((TOKENS, TOP_K), jnp.float32)
    plan = jax.eval_shape(lambda ids: row_plan(ids, num_rows=ROWS), ids)

    def jtok_forward(h, delta, table, layer, ids, scale):
        return gpu.jtok_forward(h, delta, table, (layer,), ids, scale, form)

    def jtok_backward(g, delta, table, layer, ids, scale, plan):
        return gpu.jtok_backward(g, delta, table, (layer,), ids, scale, plan, form)

    def jtok_m_forward(h, delta, tables, layer, ids, choice, weights, scale):
        return gpu.jtok_m_forward(h, delta, tables, (layer,), ids, choice, weights, scale, mixed)

    def jtok_m_backward(g, tables, layer, ids, choice, weights, scale, plan):
        return gpu.jtok_m_backward(g, tables, (layer,), ids, choice, weights, scale, plan, mixed)

    def updates(optimizer):
        state = jax.eval_shape(optimizer.init, table)
        number = shape((), jnp.float32)
        grads = shape((LAYERS, TOKENS, dim), jnp.float32)
        of = RowGrads(shape((TOKENS,), jnp.int32), grads, number, shape((), jnp.bool_))
        now, seed = Scalars(shape((), jnp.int32), number, number), shape((2,), jnp.uint32)
        run = lambda *arguments: update_kernel(gpu, optimizer, *arguments)
        return run, (table, state, of, now, seed)

    options = {"eps": 1e-8, "weight_decay": 0.0}
    return {
        "jtok forward": (jtok_forward, (stream, stream, table, layer, ids, scale)),
        "jtok_m forward": (
            jtok_m_forward, (stream, stream, tables, layer, ids, choice, weights, scale)),
        "jtok backward": (jtok_backward, (stream, stream, table, layer, ids, scale, plan)),
        "jtok_m backward": (
            jtok_m_backward, (stream, tables, layer, ids, choice, weights, scale, plan)),
        "lazy_adam": updates(lazy_adam(b1=0.9, b2=0.95, **options)),
        "rowwise_adagrad": updates(rowwise_adagrad(**options)),
    }  # fmt: skip


def assembly(function, arguments) -> list[tuple[str, list[str]]]:
    """[(what ptxas said, lines of SASS)] of every Mosaic kernel of a function, as compiled."""
    mesh = Mesh(absent_devices("h100", 1).reshape(1, 1, 1, 1), AXES, axis_types=AUTO)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: x.update(sharding=whole), arguments)
    with tempfile.TemporaryDirectory() as folder:
        dump = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"}
        os.environ |= dump | {"MOSAIC_GPU_DUMP_PTXAS": "1"}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), silent():
            jax.jit(function).lower(*placed).compile()
        found = []
        for ptx in sorted(pathlib.Path(folder).glob("*.ptx")):
            said = ptx.with_suffix(".ptxas").read_text()
            found.append((said, disassembled(ptx)))
    return found


@contextlib.contextmanager
def silent():
    """Nothing of what the compiler prints."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def disassembled(ptx: pathlib.Path) -> list[str]:
    """Instructions and labels, in order."""
    cubin = ptx.with_suffix(".cubin")
    assemble = ["ptxas", "-arch=sm_90a", "-o", str(cubin), str(ptx)]
    subprocess.run(assemble, check=True, capture_output=True)
    run = subprocess.run([nvdisasm(), "-c", str(cubin)], check=True, capture_output=True, text=True)
    code = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);|^(\.L_x_\d+):", re.MULTILINE)
    return [match[1] or match[2] for match in code.finditer(run.stdout)]


def nvdisasm() -> str:
    """The program: of the package nvidia-cuda-nvdisasm, else from the PATH."""
    for folder in sys.path:
        path = pathlib.Path(folder) / "nvidia/cu13/bin/nvdisasm"
        if path.exists():
            path.chmod(0o755)
            return str(path)
    return "nvdisasm"


def token_loop(code: list[str]) -> list[str]:
    """The innermost loop that loads rows; all of the code where there is none."""
    labels = {line: place for place, line in enumerate(code) if line.startswith(".L")}
    loops = []
    for place, line in enumerate(code):
        target = re.search(r"BRA.*(\.L_x_\d+)", line)
        if target and labels.get(target[1], place) < place:
            loops.append(code[labels[target[1]] : place])
    loops = [loop for loop in loops if row_loads(loop)]
    return min(loops, key=len) if loops else code


def row_loads(code: list[str]) -> dict[int, set[str]]:
    """{place: registers written} of loads whose values are computed with: of indices, the first use
    is an address."""
    found = {}
    for place, line in enumerate(code):
        if "UTMALDG" in line:
            found[place] = set()
        elif match := re.search(r"\bLDG\.E(\.\d+)?\S*\s+R(\d+),", line):
            width = int((match[1] or ".32")[1:]) // 32
            registers = {f"R{int(match[2]) + n}" for n in range(width)}
            uses = (later for later in code[place + 1 :] if registers & read_by(later))
            if not re.search(r"\b(IMAD|ISETP|R2UR|LEA)\b", next(uses, "")):
                found[place] = registers
    return found


def read_by(line: str) -> set[str]:
    """Registers an instruction reads, as far as its text names them."""
    return set(re.findall(r"\bR\d+\b", line.split(",", 1)[-1]))


def loads_in_flight(code: list[str]) -> tuple[int, int]:
    """(loads before the first use of one's result or a barrier after one, all loads)."""
    loads, waiting, count = row_loads(code), set(), 0
    for place, line in enumerate(code):
        if place in loads:
            count, waiting = count + 1, waiting | loads[place]
        elif count and (waiting & read_by(line) or "BAR.SYNC" in line):
            break
    return count, len(loads)


def measured(function, arguments) -> Kernel | None:
    """Return the figures of a function's first kernel; a second one merges a few rows.

    None: this process has compiled the very same kernel before, and the compiler says nothing.
    """
    kernels = assembly(function, arguments)
    if not kernels:
        return None
    said, code = kernels[0]
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    given = -(-registers // 8) * 8 * THREADS
    loop = token_loop(code)
    barriers = sum("BAR.SYNC" in line for line in loop)
    return Kernel(
        registers, min(REGISTERS // given, 2048 // THREADS), barriers, *loads_in_flight(loop)
    )


NO_LAUNCH = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "opt-barrier", "after-all", "partition-id", "replica-id",
}  # fmt: skip


def launches(text: str) -> tuple[int, list[int]]:
    """(what a compiled step launches, how often it runs each of its table kernels)."""
    total, calls, module = 0, collections.Counter(), parse(text)
    for run in runs(module):
        if run.instruction.opcode not in NO_LAUNCH and "-done" not in run.instruction.opcode:
            total += run.times
        if run.instruction.opcode == "fusion":
            inside = module.computations[run.instruction.called[0]].instructions.values()
        else:
            inside = [run.instruction]
        if any("mosaic_gpu" in one.attributes for one in inside):
            calls[run.instruction.name] += run.times
    return total, sorted(calls.values())


def print_steps(names: list[str]) -> None:
    """One line a model and kind of tables, as soon as it is compiled."""
    print("| step, 16 x 2,048 tokens | launches | over dense | runs of each table kernel | GiB |")
    print("|---|---|---|---|---|")
    for name in names:
        given = from_config_dict(runpy.run_path(f"configs/{name}.py")["get_config"]())
        dense = 0
        for kind in ("none", "jtok", "jtok_m"):
            config = changed(given, {
                "model.jtok.kind": kind, "model.jtok.table_dtype": "bfloat16", "mesh.fsdp": 1,
                "train.batch_size": 16, "train.seq_len": 2048, "train.max_unique_ids": 12000,
                "train.grad_accumulation": 1, "optimizer.tables.kind": "rowwise_adagrad",
            })  # fmt: skip
            with silent():
                compiled = compile_step(config, parse_topology("h100:1x1"))
            total, calls = launches(compiled.text)
            dense = dense or total
            size = compiled.total / 2**30
            line = f"| {name} {kind} | {total} | {total - dense} | {calls} | {size:.1f} |"
            print(line, flush=True)


def main() -> None:
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=numbers, default=[768, 1024, 1536, 2048])
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--steps", help="files in configs/, such as dense_s,dense_l")
    arguments = parser.parse_args()
    if missing := lacks("gpu"):
        raise SystemExit(missing)
    if arguments.steps:
        return print_steps(arguments.steps.split(","))
    print(f"jax {jax.__version__}, bfloat16, E {TABLES}, K {TOP_K}, for an H100; before -> after\n")
    print(f"| {'kernel':15} | {'D':>4} | registers  | blocks   | barriers | loads in flight |")
    print("|---|---|---|---|---|---|")
    for name in functions(MosaicGpu(), 128):
        if arguments.only not in name:
            continue
        for dim in arguments.dims:
            old, new = (
                measured(*functions(MosaicGpu(False, tuning), dim)[name])
                for tuning in (BEFORE, Tuning())
            )
            new = new or old
            flight = f"{old.in_flight} of {old.loads} -> {new.in_flight} of {new.loads}"
            print(
                f"| {name:15} | {dim:4} | {old.registers:3} -> {new.registers:3} "
                f"| {old.blocks:2} -> {new.blocks:2} | {old.barriers:2} -> {new.barriers:2} "
                f"| {flight:15} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
