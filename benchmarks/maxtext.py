# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A training step of ours beside MaxText's, compiled for the same TPUs: no hardware is needed.

python benchmarks/maxtext.py [--only=NAME,...]

Both have the shapes of dense_l without tables: 24 layers of 1536, 12 heads of 128, FFN 5632,
vocabulary 50,304, 8 sequences of 2,048 a device, fsdp 8, AdamW, clip 1. Compute is in bfloat16,
parameters are float32, layers are scanned. remat is "dots" here and "minimal" in MaxText. Cycles
are the compiler's own estimates, summed by jtok_jax/planning/cycles.py. Nothing is executed.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from unittest import mock

VERSION = "0.2.5"
ROOT = pathlib.Path(__file__).resolve().parent.parent
TOPOLOGY = "v5p:2x2x2"  # MaxText names it by its cores: v5p-16
LAYERS = 24
THRESHOLD = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
SHAPES = (
    "base_emb_dim=1536 base_num_query_heads=12 base_num_kv_heads=12 base_mlp_dim=5632 head_dim=128 "
    f"base_num_decoder_layers={LAYERS} vocab_size=50304 max_target_length=2048 "
    "per_device_batch_size=8 ici_fsdp_parallelism=8 remat_policy=minimal enable_dropout=false "
    "dataset_type=synthetic enable_checkpointing=false skip_jax_distributed_system=true "
    "compile_topology=v5p-16 compile_topology_num_slices=1 run_name=compared"
).split()
SPLASH = re.compile(r"splash_\w*?_(fwd|dkv|dq)_")
PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}  # of T x T x H, half of them causal
FLOPS_A_CYCLE = 459e12 / 1.75e9  # of a v5p at its peak
# MaxText's plain attention has no name of its own: einsums, softmax and mask inside a layer.
DOT_PRODUCT = re.compile(
    r"bkgts|/(checkpoint/)?(rematted_computation/)?(reduce_sum|reduce_max|ge)$"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled step: of MaxText with these options, or of ours with this attention."""

    title: str
    maxtext: tuple[str, ...] = ()
    attention: str = ""
    options: str = ""  # of the compiler
    recompute: bool = False  # the output of splash attention, as MaxText's "minimal" does


FLASH, DOT = ("attention=flash",), ("attention=dot_product", "num_vocab_tiling=4")
ROWS = {
    "maxtext-flash": Row("MaxText flash", FLASH),
    "maxtext-dot": Row("MaxText dot_product, loss tiled 4", DOT),
    "xla": Row("ours, xla", attention="xla"),
    "chunked": Row("ours, chunked", attention="chunked"),
    "auto": Row("ours, auto", attention="auto"),
    "recomputed": Row("ours, auto, attention recomputed", attention="auto", recompute=True),
    "off-maxtext": Row(
        "collective matmul off: MaxText flash, tiled 4", (*FLASH, DOT[1]), options=THRESHOLD
    ),
    "off-xla": Row("collective matmul off: ours, xla", attention="xla", options=THRESHOLD),
    "off-auto": Row("collective matmul off: ours, auto", attention="auto", options=THRESHOLD),
}


def compile_maxtext(row: Row):
    """MaxText's own train_compile, whose compiled step is kept."""
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    kept = []
    compile_step = train_compile.jit_and_compile

    def keep(*arguments, **named):
        kept.append(compile_step(*arguments, **named))
        return kept[0]

    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),
        mock.patch.object(train_compile, "jit_and_compile", keep),
    ):
        options = [f"base_output_directory={folder}"]
        if row.options:
            options.append(f"compile_xla_flags={row.options}")
        train_compile.main(["train_compile", str(base), *SHAPES, *row.maxtext, *options])
    return kept[0]


def compile_ours(row: Row):
    """The step of train.py, where "auto" is what it comes to on this topology."""
    from jtok_jax.config_dict import from_config_dict
    from jtok_jax.model import transformer
    from jtok_jax.planning.advice import changed
    from jtok_jax.planning.compiled import compile_for_topology
    from jtok_jax.planning.topology import parse_topology

    topology = parse_topology(TOPOLOGY)
    config = from_config_dict(runpy.run_path(ROOT / "configs" / "dense_l.py")["get_config"]("none"))
    fields = {
        "mesh.fsdp": 8, "model.attention": row.attention, "model.remat": "dots",
        "train.batch_size": 64, "train.seq_len": 2048, "evaluation.batch_size": 64,
        "train.compiler_options": row.options,
    }  # fmt: skip
    kept = "nothing" if row.recompute else transformer.SAVED
    with mock.patch.object(transformer, "SAVED", kept):
        return compile_for_topology(changed(config, fields), topology)


def kernels_at_peak(text: str) -> float:
    """Return the cycles that the splash kernels of a step take at the peak rate of matmuls."""
    from jtok_jax.planning.hlo import parse, runs

    product = 2048**2 * 128 * 12 * 8 / FLOPS_A_CYCLE
    found = ((SPLASH.search(run.instruction.name), run.times) for run in runs(parse(text)))
    return sum(product * PRODUCTS[match[1]] * times for match, times in found if match)


def measure(row: Row) -> dict:
    from jtok_jax.planning.compiled import absent_devices
    from jtok_jax.planning.cycles import ATTENTION, count

    absent_devices(TOPOLOGY, 1)  # libtpu's environment, before JAX starts in MaxText
    step = compile_maxtext(row) if row.maxtext else compile_ours(row)
    named = DOT_PRODUCT if "attention=dot_product" in row.maxtext else ATTENTION
    cycles = count(step.as_text(), num_layers=LAYERS, attention=named)
    return {
        "peak": step.memory_analysis().peak_memory_in_bytes,
        "accessed": step.cost_analysis()["bytes accessed"],
        "cycles": cycles._asdict(),
        "kernels_at_peak": kernels_at_peak(step.as_text()),
    }


def line(row: Row, found: dict) -> str:
    cycles = found["cycles"]
    kinds = {name: value / 1e6 for name, value in cycles["by_kind"].items()}
    at_peak = found["kernels_at_peak"] / 1e6
    kernels = f" + {cycles['kernels']} kernels" if cycles["kernels"] else ""
    sent = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in cycles["received"].items() if v >= 2**20)
    cells = [
        row.title, f"{found['peak'] / 2**30:.2f}",
        f"{sum(kinds.values()):.0f}{kernels}", f"{sum(kinds.values()) + at_peak:.0f}",
        f"{kinds['attention']:.0f}",
        f"{kinds['layer matmuls']:.0f}", f"{kinds['other matmuls']:.0f}",
        f"{found['accessed'] / 1e9:.1f}", sent,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def missing() -> str | None:
    """Why nothing can be compared here, in one line, or None."""
    from jtok_jax.planning.compiled import lacks

    if why := lacks("tpu"):
        return f"{why}."
    try:
        importlib.metadata.version("maxtext")  # this file would be found as its module
    except importlib.metadata.PackageNotFoundError:
        return f"MaxText is not installed; pip install 'maxtext[tpu]=={VERSION}' beside jtok_jax."
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(ROWS), help="of " + ", ".join(ROWS))
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)  # a process of its own each
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if arguments.row:
        print(json.dumps(measure(ROWS[arguments.row])))
        return 0
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in ROWS]
    why = f"--only has {unknown[0]!r}; expected of {', '.join(ROWS)}." if unknown else missing()
    if why:
        print(why, file=sys.stderr)
        return 2
    versions = [f"{n} {importlib.metadata.version(n)}" for n in ("maxtext", "jax", "libtpu")]
    print("command ", shlex.join(["python", *sys.argv]), f"({', '.join(versions)}; {TOPOLOGY})\n")
    print("| per device | peak GiB | Mcycles | with kernels at peak | attention | layer matmuls "
          "| other matmuls | GB accessed, loops once | collectives, GiB received |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for name in names:
        command = [sys.executable, "-P", __file__, f"--row={name}"]  # -P: MaxText, not this file
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed = True
            print(f"| {ROWS[name].title} | failed, see the errors |", flush=True)
            print(done.stderr[-4000:], file=sys.stderr, flush=True)
            continue
        print(line(ROWS[name], json.loads(done.stdout.splitlines()[-1])), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
