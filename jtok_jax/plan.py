# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Does a run fit, what does it send, how long is a step? Nothing is needed but a CPU.

    python -m jtok_jax.plan --config=configs/dense_l.py --topology=v5p:2x2x2 --config.mesh.fsdp=8

Topologies: grids of TPUs, v5e:4x8, v5p:8x8x8, v6e:8x8; hosts x GPUs of a host, h100:4x8, h200:1x8.
Exit code 0 where it fits, 1 where it does not, 2 at a wrong configuration.
"""

import json
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jtok_jax.command_line import parse_flags
from jtok_jax.config_dict import from_config_dict
from jtok_jax.errors import ConfigError, exit_on_error
from jtok_jax.planning.report import as_text, draw, make_plan
from jtok_jax.planning.topology import parse_topology

CONFIG = config_flags.DEFINE_config_file("config", None, "File in configs/.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:GRID, such as v5p:4x4x4 or h100:4x8.")
COMPILE = flags.DEFINE_bool(
    "compile", False, "Compile the step too, and show the compiler's sizes."
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object: bytes, seconds, FLOPs.")
PLOT = flags.DEFINE_string("plot", None, "Also draw what a device holds into this file.")


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with exit_on_error():
        if len(arguments) > 1:
            raise ConfigError(f"Unexpected argument {arguments[1]!r}; options start with --.")
        for name in ("config", "topology"):
            if not flags.FLAGS[name].value:
                raise ConfigError(
                    f"--{name} is missing. Example: {__doc__.splitlines()[2].strip()}"
                )
        jax.config.update("jax_platforms", "cpu")  # plugins would look for devices, and complain
        topology = parse_topology(TOPOLOGY.value)
        plan = make_plan(from_config_dict(CONFIG.value), topology, compile_too=COMPILE.value)
        print(json.dumps(plan) if JSON.value else as_text(plan), flush=True)
        if PLOT.value:
            draw(plan, pathlib.Path(PLOT.value))
        sys.exit(0 if plan["memory"]["fits"] else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
