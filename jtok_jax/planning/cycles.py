# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The cycles that a TPU's compiler expects of a step, summed over its compiled text.

Every instruction counts as often as its loops turn. Kernels (Pallas) and collectives carry no
estimate, and nothing is said of what overlaps: a sum is no time, but two of them can be compared.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from jtok_jax.planning.hlo import Instruction, Module, Run, parse, runs

KINDS = ("attention", "layer matmuls", "other matmuls", "collectives", "the rest")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# jax.nn.dot_product_attention and splash attention map over a batch, nothing else in a layer does.
ATTENTION = re.compile(r"\bvmap\(|splash")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NONE = 2**62  # more is the compiler's "unknown"
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Cycles(NamedTuple):
    """Estimated cycles of a step on one device, and what they leave out."""

    by_kind: dict[str, int]
    kernels: int  # runs of Pallas kernels, which carry no estimate
    unknown: int  # runs of fusions without an estimate
    loops: int  # loops of unknown length, which count once
    received: dict[str, int]  # bytes of the results of collectives, by kind

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def count(text: str, *, num_layers: int, attention: re.Pattern = ATTENTION) -> Cycles | None:
    """Return the sums over `compiled.as_text()`, None where it carries no estimates (GPU, CPU).

    Args:
        num_layers: turns of the loop over layers; it tells a layer's matmuls from others.
        attention: found in the names of attention's instructions.
    """
    module = parse(text)
    by_kind, received = dict.fromkeys(KINDS, 0), Counter()
    kernels, unknown, loops = 0, 0, set()
    for run in runs(module):
        one, cycles = run.instruction, _estimate(run.instruction)
        if cycles is not None:
            by_kind[_kind(module, run, num_layers, attention)] += cycles * run.times
        elif 'custom_call_target="tpu_custom_call"' in one.attributes:
            kernels += run.times
        elif one.opcode == "fusion":
            unknown += run.times
        loops |= {loop.instruction.name for loop in run.loops if loop.turns is None}
        collective = one.opcode.removesuffix("-done")
        if collective in COLLECTIVES:
            received[collective] += array_bytes(one.shape) * run.times
    if not any(by_kind.values()):
        return None
    return Cycles(by_kind, kernels, unknown, len(loops), dict(received))


def array_bytes(shape: str) -> int:
    """Return the bytes of the arrays of a shape such as bf16[8,128]{1,0}, or of a tuple of them."""
    size = 0
    for kind, bits, dimensions in _ARRAY.findall(shape):
        entries = math.prod(int(n) for n in dimensions.split(",") if n)
        size += entries * (1 if kind == "pred" else max(1, int(bits or 8) // 8))
    return size


def _estimate(one: Instruction) -> int | None:
    found = _CYCLES.search(one.attributes)
    return int(found[1]) if found and int(found[1]) < _NONE else None


def _kind(module: Module, run: Run, num_layers: int, attention: re.Pattern) -> str:
    one = run.instruction
    if attention.search(one.op_name):
        return "attention"
    if one.opcode.startswith(COLLECTIVES):
        return "collectives"
    in_layer = any(loop.turns == num_layers for loop in run.loops)
    # A loop that is itself a product passes slices of a weight around: a collective matmul.
    ring = any(loop.instruction.op_name.endswith("dot_general") for loop in run.loops)
    if ring or _multiplies(module, one):
        return "layer matmuls" if in_layer else "other matmuls"
    return "the rest"


def _multiplies(module: Module, one: Instruction) -> bool:
    """Return whether it holds a matrix product, which TPUs have as a convolution."""
    if one.opcode in ("convolution", "dot"):
        return True
    inner = [
        part for name in one.called for part in module.computations[name].instructions.values()
    ]
    return one.opcode == "fusion" and any(_multiplies(module, part) for part in inner)
