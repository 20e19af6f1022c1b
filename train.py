# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Train a model: python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any field is overridden by --config.a.b=c. The same command goes on where a run stopped.

Starting rules:
  a fresh workdir                     starts at step 1
  a workdir with a checkpoint         goes on after it, bit for bit
  a workdir of another configuration  is refused, with the difference
  a workdir in use                    is refused before anything is touched
The same command started on several hosts is one run (docs/hosts.md).
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jtok_jax.command_line import parse_flags
from jtok_jax.config import Config
from jtok_jax.config_dict import describe_fields, from_config_dict
from jtok_jax.errors import ConfigError, exit_on_error
from jtok_jax.hosts import ALONE, Hosts, joined
from jtok_jax.launch import recognise
from jtok_jax.training.run import open_run

CONFIG = config_flags.DEFINE_config_file("config", None, "File in configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints and metrics.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run; 1: this one is alone.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.")


def train(config: Config, workdir: pathlib.Path, hosts: Hosts = ALONE) -> None:
    """Train until config.train.steps, or until a signal asks to stop."""
    with open_run(config, workdir, hosts) as run:
        state = run.restore_or_init()
        steps = config.train.steps
        if run.is_finished():
            hosts.say(f"{workdir} has finished its {steps} steps; nothing to do.")
            return
        run.open_writers()
        if run.first_step <= steps:
            run.compile(state)
        if run.validation_due:
            run.validate_first(state)
        for step, batch in run.batches():
            health = run.steps.health(state, batch) if run.log_due(step) else {}
            state, metrics = run.steps.train(state, batch)  # queued: the device works on it
            run.report(step, metrics, health)  # waits for the step before this one
            run.checkpoints.check()
            run.stop.reached()
            if run.evaluation_due(step):
                run.evaluate(state)
            if run.save_due(step):
                run.save(step, state)
            run.raise_if_stopped(step)
        hosts.say(f"finished {steps} steps; checkpoint in {workdir / 'checkpoints' / str(steps)}")


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with exit_on_error():
        if len(arguments) > 1:
            raise ConfigError(f"Unexpected argument {arguments[1]!r}; options start with --.")
        for name in ("config", "workdir"):
            if not flags.FLAGS[name].value:
                example = __doc__.splitlines()[0].partition(": ")[2]
                raise ConfigError(f"--{name} is missing. Example: {example}")
        config, workdir = from_config_dict(CONFIG.value), pathlib.Path(WORKDIR.value)
        launch = recognise(os.environ, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        with joined(launch, workdir, config.train) as hosts:
            train(config, workdir, hosts)


if __name__ == "__main__":
    if "--help" in sys.argv:
        __doc__ += "\nFields of the configuration, with their defaults:\n"
        __doc__ += "\n".join(describe_fields())
    app.run(main, flags_parser=parse_flags)
