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

import contextlib
import functools
import os
import pathlib
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jtok_jax.config import Config
from jtok_jax.config_dict import flatten, from_config_dict, to_dict
from jtok_jax.data.loader import open_source, train_batches
from jtok_jax.errors import ConfigError, DataError, Preempted, exit_on_error, parse_flags
from jtok_jax.hosts import ALONE, Hosts, code_and_versions, joined
from jtok_jax.launch import recognise
from jtok_jax.mesh import (
    check_batches,
    make_mesh,
    put_batch,
    replicated,
    rows_here,
)
from jtok_jax.model.placement import describe, jtok_column_shards
from jtok_jax.training import guards
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.evaluate import evaluate
from jtok_jax.training.metrics import (
    MetricsWriter,
    Timer,
    console_line,
    parameter_table,
    step_record,
    validation_due,
)
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.resume import claim_workdir
from jtok_jax.training.state import abstract_state, init_state
from jtok_jax.training.step import jit_train_step, make_eval_step, make_health_step

CONFIG = config_flags.DEFINE_config_file("config", None, "File in configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints and metrics.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run; 1: this one is alone.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.")


def train(config: Config, workdir: pathlib.Path, hosts: Hosts = ALONE) -> None:
    """Train until config.train.steps, or until a signal asks to stop."""
    with contextlib.ExitStack() as stack:
        if not hosts.several:
            stack.enter_context(guards.WorkdirLock(workdir))
        hosts.agree("code and versions", code_and_versions(), ConfigError)
        hosts.agree("configuration", flatten(to_dict(config)), ConfigError)
        hosts.check_shared(workdir / guards.LOCK_FILE)
        stop = stack.enter_context(guards.StopSignal())
        stall = guards.StallWatch(workdir, config.train.stall_seconds, hosts.announce)
        # ---------------------------------------------------------------- mesh and data
        with stall.waiting_for("devices of all processes"):
            mesh = make_mesh(config.mesh)
        size = config.train.batch_size
        rows = rows_here(mesh, size)
        hosts.stage(f"has {jax.local_device_count()} of {jax.device_count()} devices and reads "
                    f"{len(rows)} of {size} sequences of a batch")  # fmt: skip
        check_batches(config, mesh)
        source = open_source(config)
        if hosts.lead:
            claim_workdir(workdir, config)
        kind = jax.devices()[0].device_kind
        hosts.say(f"{jax.device_count()} x {kind}, {describe(config, mesh)}")
        hosts.say(parameter_table(config, column_shards=jtok_column_shards(config, mesh)))

        # ---------------------------------------------------------------- model and optimizer
        optimizer = make_optimizer(config)
        train_step = jit_train_step(config, optimizer, mesh)
        eval_step = jax.jit(make_eval_step(config, mesh), out_shardings=replicated(mesh))
        health_step = jax.jit(make_health_step(config, mesh), out_shardings=replicated(mesh))
        validate = functools.partial(
            evaluate, eval_step, source=source, mesh=mesh,
            batch_size=config.evaluation.batch_size, waiting_for=stall.waiting_for,
            stop=stop.reached,
        )  # fmt: skip

        # ---------------------------------------------------------------- resume or start
        checkpoints = Checkpoints(workdir, config, data=source.fingerprint)
        stack.callback(stall.within, "end of the last save", checkpoints.close)
        stack.push(hosts.leave_if_alone)
        done = checkpoints.latest_step()
        due = validation_due(workdir, done, config)
        found = source.fingerprint | {"last step": done, "validation due": due}
        hosts.agree("data and checkpoint", found, DataError)
        if done is None:
            state = init_state(config, optimizer, mesh)
        else:
            with stall.waiting_for(f"restored checkpoint of step {done}"):
                state = checkpoints.restore(abstract_state(config, optimizer, mesh))
            hosts.say(f"resumed at step {done}")
        steps = config.train.steps
        if done is not None and done >= steps and not due:
            hosts.say(f"{workdir} has finished its {steps} steps; nothing to do.")
            return
        folder = workdir if hosts.lead else None
        writer = MetricsWriter(folder, resumed_at=done, tensorboard=config.logging.tensorboard)
        stack.callback(writer.close)
        at = done or 0
        if done is None or due:
            validation = validate(state.params)
            if validation is None:
                raise Preempted(f"{stop.agreed} while validating step {at}. Run the same command.")
            guards.require_finite(at, validation.val_loss, config, checkpoints.latest_step)
            hosts.say(f"step {at}: {validation}")
            writer.complete(at, validation._asdict())

        # ---------------------------------------------------------------- loop
        timer = Timer(config)
        batches = train_batches(source, config, rows, first_step=at + 1)
        unreported = None  # metrics are fetched a step late: the device never waits for us

        def report(step, metrics, health, data_wait, *, evaluating=False):
            """Write down one step, which is waited for; evaluate after it unless told to stop."""
            with stall.waiting_for(f"end of step {step}"):
                record = step_record(metrics, health, step=step)
            record |= timer.step(data_wait=data_wait)
            if health or step == 1 or record["bad_in_row"]:
                hosts.say(console_line(record, steps=steps))
            if evaluating:
                validation = validate(state.params)
                if validation:
                    record |= validation._asdict()
                    hosts.say(f"step {step}: {validation}")
            writer.write(record)
            guards.require_sound(record, config, checkpoints.latest_step)
            return "val_loss" in record

        for step in range(at + 1, steps + 1):
            asked = time.perf_counter()
            with stall.waiting_for(f"batch for step {step}"):
                batch = next(batches)
            wait = time.perf_counter() - asked
            arrays = [put_batch(mesh, array, size=size) for array in batch]
            last, evaluated = step == steps, False
            evaluating = last or step % config.evaluation.every == 0
            logged = evaluating or step % config.train.log_every == 0
            health = health_step(state.params, arrays[0]) if logged else {}
            state, metrics = train_step(state, *arrays)
            if unreported:
                report(*unreported)
            unreported = step, metrics, health, wait
            checkpoints.check()
            stopped_by = stop.reached()
            saving = last or stopped_by or step % config.checkpoint.every == 0
            if evaluating or saving:
                evaluated = report(*unreported, evaluating=evaluating)
                unreported, stopped_by = None, stop.agreed  # a signal may come while it validates
                if saving or stopped_by:
                    with stall.waiting_for(f"end of the save before step {step}"):
                        checkpoints.wait()
                    with stall.waiting_for(f"completed save at step {step}"):
                        checkpoints.save(state, step)
                        if last or stopped_by:
                            checkpoints.wait()
                timer.restart()
            if stopped_by and not (last and evaluated):
                raise Preempted(f"{stopped_by}: saved step {step}. Run the same command to go on.")
        hosts.say(f"finished {steps} steps; checkpoint in {workdir / 'checkpoints' / str(steps)}")


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with exit_on_error():
        if len(arguments) > 1:
            raise ConfigError(f"Unexpected argument {arguments[1]!r}; options start with --.")
        for name in ("config", "workdir"):
            if not flags.FLAGS[name].value:
                raise ConfigError(f"--{name} is missing. Example: {__doc__.splitlines()[0]}")
        config, workdir = from_config_dict(CONFIG.value), pathlib.Path(WORKDIR.value)
        launch = recognise(os.environ, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        with joined(launch, workdir, config.train, guards.WorkdirLock) as hosts:
            train(config, workdir, hosts)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
