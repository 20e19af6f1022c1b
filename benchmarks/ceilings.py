# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Measure what the device can do at most: python benchmarks/ceilings.py

Copying 8 GB of random data, and a bfloat16 matmul of two random 8192 x 8192 matrices. Random data,
because a card is faster on zeros: they take less power.
"""

from timing import copy_bandwidth, device_line, matmul_flops, record, say


def main() -> None:
    say("device  ", device_line())
    bandwidth = copy_bandwidth()
    say(f"copy     {bandwidth / 1e9:.1f} GB/s, read and written")
    record(table="ceilings", name="copy, GB/s", value=bandwidth / 1e9)
    flops = matmul_flops()
    say(f"matmul   {flops / 1e12:.1f} TFLOP/s, bfloat16")
    record(table="ceilings", name="matmul, TFLOP/s", value=flops / 1e12)


if __name__ == "__main__":
    main()
