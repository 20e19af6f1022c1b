# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Count what the TPU kernels make a TPU do, without one: python benchmarks/tpu_estimate.py

Needs libtpu (`pip install -e '.[aot]'`) and no TPU. Each kernel is compiled, and the bundles of its
last schedule are counted: a bundle is what a TensorCore issues in one cycle. Not counted are stalls
and memory, so the sum is a lower bound of cycles. The compiler has no estimate of its own for a
Pallas kernel, nor for XLA's gather.

  bundles/row    of the loop that starts the copies of rows
  waits/block    how often a block waits for its rows
  bundles/token  of all that a block does: starting copies, waiting, computing, its own frame
  VMEM           rows, streams and internal scratch, MiB

With --before=FOLDER (`kernels` of another checkout) each figure is printed for both, A -> B. Then
XLA's gather of the same rows: whether the compiler moves it to the SparseCores, and bundles a row
where it stays on the TensorCore.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHIPS = "v5e:2x2", "v5p:2x2x1", "v6e:2x2"
DIMS = 768, 1024, 2048
TOKENS, ROWS, TABLES, TOP_K = 4096, 65536, 5, 2
OFFLOAD = "xla_tpu_offload_gather_to_sparsecore"
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PF|PH|CT)?\s*:?\s*(>*) \{")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--dims", default=",".join(map(str, DIMS)))
    parser.add_argument("--before", help="kernels folder of another checkout")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    dims = [int(dim) for dim in options.dims.split(",")]
    if options.child:
        return count_all(options.chips, dims, pathlib.Path(options.child))
    print("| chip | operation | D | block | bundles/row | waits/block | bundles/token | VMEM |")
    print("|---|---|---|---|---|---|---|---|")
    gathers = []
    for chip in options.chips.split(","):
        after = run_child(chip, dims, ROOT / "kernels")
        before = run_child(chip, dims, options.before) if options.before else {}
        gathers += [f"| {chip} | {x} |" for x in after.pop("gather")]
        for name, figures in after.items():
            old = before.get(name)
            cells = [f"{old[k]} -> {v}" if old else f"{v}" for k, v in figures.items()]
            print(f"| {chip} | {name} | {' | '.join(cells)} |", flush=True)
    print("\n| chip | XLA's gather | default | offload off |\n|---|---|---|---|")
    print("\n".join(gathers))


def run_child(chip: str, dims: list[int], kernels) -> dict:
    """Return the figures by operation, from a process that dumps its programs."""
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join(map(str, (pathlib.Path(kernels).resolve(), ROOT)))
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {
            "PYTHONPATH": paths, "LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        arguments = [f"--chips={chip}", f"--dims={','.join(map(str, dims))}", f"--child={folder}"]
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{chip} with {kernels} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def count_all(chip: str, dims: list[int], folder: pathlib.Path) -> None:
    """Print the figures of one chip as JSON."""
    figures = {}
    for kind in ("JTok", "JTok-M"):
        for direction in ("forward", "backward"):
            for dim in dims:
                compile_here(chip, *kernel(kind, direction, dim), folder=folder)
                top_k = 1 if kind == "JTok" else TOP_K
                figures[f"{kind} {direction} | {dim}"] = count(folder, top_k)
    figures["gather"] = [gather(chip, dim, folder) for dim in dims]
    print(json.dumps(figures))


def kernel(kind: str, direction: str, dim: int):
    """Return one operation on packed bfloat16 tables and its arguments; backward: no row sums."""
    import jax
    from jtok_kernels import jtok, jtok_m, row_plan

    several = () if kind == "JTok" else (TABLES,)
    shape = jax.ShapeDtypeStruct
    stream, stack = shape((TOKENS, dim), "bfloat16"), shape((*several, ROWS, dim // 2), "uint32")
    choice, weights = shape((TOKENS, TOP_K), "int32"), shape((TOKENS, TOP_K), "float32")
    options = {"eps": 1e-6, "implementation": "mosaic_tpu"}

    def forward(h, delta, stack, ids, choice, weights, scale):
        if kind == "JTok":
            return jtok(h, delta, stack, ids, scale, **options)
        options["depth_scale"] = 0.2
        return jtok_m(h, delta, stack, ids, choice, weights, scale, **options)

    def backward(h, delta, stack, ids, choice, weights, scale):
        plan = row_plan(ids, num_rows=ROWS)
        options["plan"] = plan
        options["row_grads"] = jax.numpy.zeros((*several, plan.unique_U.size, dim))
        f = lambda delta, weights, scale: forward(h, delta, stack, ids, choice, weights, scale)
        pull = jax.vjp(f, delta, weights, scale)[1]
        return pull(h)  # h stands for the cotangent; forward is not needed and not compiled

    ids = shape((TOKENS,), "int32")
    arguments = stream, stream, stack, ids, choice, weights, shape((dim,), "float32")
    return (forward if direction == "forward" else backward), arguments


def compile_here(chip: str, function, arguments, *, folder: pathlib.Path, options=None) -> str:
    """Return the compiled program; its dump is all that is left in `folder`."""
    import jax

    from jtok_jax.mesh import AUTO, AXES
    from jtok_jax.planning.compiled import absent_devices, not_cached

    mesh = jax.sharding.Mesh(absent_devices(chip, 1).reshape(1, 1, 1, 1), AXES, axis_types=AUTO)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for path in folder.iterdir():
        path.unlink()
    arguments = [x.update(sharding=place) for x in arguments]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), not_cached():
        return jax.jit(function).lower(*arguments).compile(compiler_options=options).as_text()


def count(folder: pathlib.Path, top_k: int) -> dict:
    """Return the figures of the one Pallas kernel in `folder`."""
    found = [
        path
        for path in folder.glob("*[0-9]-final_bundles.txt")
        if "nonzero value upon exit from a Mosaic kernel" in path.read_text()
    ]
    if len(found) != 1:
        raise SystemExit(f"expected the dump of one kernel, found {len(found)}")
    frame, *loops = loops_of(found[0].read_text())
    first, ahead = (loop for loop in loops if loop["copies"])  # the first block's, run once
    block = ahead["copies"] * ahead["turns"] // top_k
    repeated = [loop for loop in loops if loop is not first]
    bundles = frame["bundles"] + sum(loop["bundles"] * loop["turns"] for loop in repeated)
    waits = sum(loop["turns"] for loop in loops if loop["waits"]) or 1
    allocated = next(folder.glob(found[0].name.partition("-")[0] + "*-02-original.txt"))
    sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", allocated.read_text())
    return {
        "block": block,
        "bundles/row": round(ahead["bundles"] / ahead["copies"], 1),
        "waits/block": waits,
        "bundles/token": round(bundles / block, 1),
        "VMEM": round(sum(int(size, 16) for size in sizes) / 2**20, 1),
    }


def loops_of(text: str) -> list[dict]:
    """Return bundles, row copies, waits and turns of each loop, its own loops left out."""
    loops, mine = [], None
    for line in text.splitlines():
        if match := BUNDLE.match(line):
            depth = len(match[2])
            if match[1] == "LB":
                loops.append({"depth": depth, "bundles": 0, "copies": 0, "waits": 0, "turns": 1})
            mine = next((loop for loop in reversed(loops) if loop["depth"] == depth), None)
        if mine is None:
            continue
        mine["bundles"] += bool(match)
        mine["copies"] += len(re.findall(r"= dma\.hbm_to_vmem", line))
        mine["waits"] += line.count("dma.done.wait")
        if turns := re.search(r", (\d+) /\* loop exit test", line):
            mine["turns"] = int(turns[1])
    return loops


def gather(chip: str, dim: int, folder: pathlib.Path) -> str:
    """Return cells: where XLA puts the gather of rows by default, and without SparseCores."""
    import jax

    shape = jax.ShapeDtypeStruct
    take = lambda table, ids: table.at[ids].get(mode="promise_in_bounds")
    # XLA would copy the whole of a smaller table to vector memory, as nothing else is in it here.
    arguments = shape((4 * ROWS, dim), "bfloat16"), shape((TOKENS,), "int32")
    cells = []
    for options in ({}, {OFFLOAD: "false"}):
        text = compile_here(chip, take, arguments, folder=folder, options=options)
        if '"sparsecore"' in text:
            cells.append("SparseCore, asynchronous")
            continue
        path = next(folder.glob("*gather_fusion*[0-9]-final_bundles.txt"))
        (loop,) = loops_of(path.read_text())
        cells.append(f"TensorCore, {loop['bundles'] / loop['copies']:.1f} bundles/row")
    return f"bfloat16, D {dim} | " + " | ".join(cells)


if __name__ == "__main__":
    main()
