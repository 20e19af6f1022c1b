# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Chips, what they are stated to do, and how many of them stand where."""

import math
import re
from typing import NamedTuple

from jtok_jax.errors import ConfigError
from jtok_jax.flops import peak_flops

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator. Rates are those of the vendor's data sheet, in bytes a second.

    `memory` is what a program can have: of a TPU what its compiler grants, of a GPU all of it.
    `most` is how many one job can have: of TPUs a pod.
    `link` is what leaves a chip by its fast links (ICI, NVLink), all together and one way;
    `network` what leaves it for another host by anything else (0: fast links go everywhere).
    `host_link` is what its host and it exchange, each way (0: not stated).
    """

    kind: str  # as JAX names the device
    platform: str
    memory: int
    memory_rate: float
    link: float
    network: float
    per_host: int
    most: int
    host_link: float

    @property
    def peak_flops(self) -> float:
        """Return dense bfloat16 FLOP/s."""
        return peak_flops(self.kind)


# TPUs: cloud.google.com/tpu/docs (chip pages), memory as libtpu's out-of-memory errors state it.
# GPUs: NVIDIA's data sheets; a host has one 400 Gbit/s adapter a GPU, and PCIe 5 x16 to each.
CHIPS = {
    "v5e": Chip("TPU v5 lite", "tpu", int(15.75 * GIB), 819e9, 200e9, 0, 4, 256, 0),
    "v5p": Chip("TPU v5", "tpu", int(95.73 * GIB), 2765e9, 600e9, 0, 4, 8960, 0),
    "v6e": Chip("TPU v6 lite", "tpu", int(31.24 * GIB), 1640e9, 448e9, 0, 4, 256, 0),
    "h100": Chip(
        "NVIDIA H100 80GB HBM3", "gpu", 84978434048, 3352e9, 450e9, 50e9, 8, 1 << 20, 64e9
    ),
    "h200": Chip("NVIDIA H200", "gpu", 150754820096, 4800e9, 450e9, 50e9, 8, 1 << 20, 64e9),
}


class Topology(NamedTuple):
    """`devices` chips on `hosts` hosts; `grid` as it was written."""

    name: str
    chip: Chip
    grid: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.grid)

    @property
    def hosts(self) -> int:
        if self.chip.platform == "gpu":
            return self.grid[0]
        return max(1, self.devices // self.chip.per_host)

    @property
    def devices_per_host(self) -> int:
        return self.devices // self.hosts


def _of_slice(text: str) -> str:
    """Return the grid of a slice's name, such as v5p-64 (of cores) or v5litepod-16 (of chips)."""
    match = re.fullmatch(r"(v5p|v5e|v5litepod|v6e)-(\d+)", text)
    power = int(match[2]).bit_length() - 1 if match else 0
    if not match or power < (match[1] == "v5p") or int(match[2]) != 1 << power:
        return ""
    if match[1] == "v5p":
        sizes = sorted((1 << (power - 1 + n) // 3 for n in range(3)), reverse=power < 4)
        return f" {text} (cores, two a chip) is v5p:{'x'.join(map(str, sizes))}."
    chip = match[1].replace("litepod", "e")
    return f" {text} is {chip}:{1 << power // 2}x{1 << power - power // 2}."


def parse_topology(text: str) -> Topology:
    """Return the topology of "v5p:4x4x4" (grid of chips) or "h100:4x8" (hosts x GPUs of a host).

    Raises:
        ConfigError: the chip is unknown, or the grid is not one of that chip.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not match or match[1] not in CHIPS:
        known = ", ".join(CHIPS)
        raise ConfigError(
            f"--topology is {text!r}; expected CHIP:GRID with a chip of {known}: v5p:4x4x4 is a "
            f"grid of TPUs, h100:4x8 is 4 hosts of 8 GPUs.{_of_slice(text)}"
        )
    chip, grid = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    wanted = 3 if match[1] == "v5p" else 2
    if len(grid) != wanted or 0 in grid:
        example = "v5p:4x4x4" if wanted == 3 else f"{match[1]}:4x8"
        raise ConfigError(
            f"--topology is {text!r}; {match[1]} has "
            + (f"grids of {wanted} sizes" if chip.platform == "tpu" else "HOSTSxGPUS")
            + f", each at least 1, such as {example}."
        )
    if chip.platform == "gpu" and grid[1] > chip.per_host:
        hosts = -(-math.prod(grid) // chip.per_host)
        raise ConfigError(
            f"--topology is {text!r}; a host has at most {chip.per_host} GPUs: {math.prod(grid)} "
            f"are {match[1]}:{hosts}x{chip.per_host}."
        )
    if math.prod(grid) > chip.most:
        raise ConfigError(f"--topology is {text!r}; a pod has {chip.most} chips of {match[1]}.")
    return Topology(text, chip, grid)
