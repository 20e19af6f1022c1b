# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Train a model: python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any field is overridden by --config.a.b=c. The same command goes on where a run stopped.

Starting rules:
  a fresh workdir                     starts at step 1
  a workdir with a checkpoint         goes on after it, bit for bit
  a workdir of another configuration  is refused, with the difference
  a workdir in use                    is refused before anything is touched
"""

import contextlib
import pathlib
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jtok_jax.config import Config
from jtok_jax.config_dict import from_config_dict
from jtok_jax.data.loader import open_source, train_batches
from jtok_jax.errors import ConfigError, NonFiniteError, Preempted, exit_on_error, parse_flags
from jtok_jax.mesh import (
    check_batch,
    describe,
    make_mesh,
    num_shards,
    put_batch,
    table_layout,
)
from jtok_jax.model.exchange import compiler_options
from jtok_jax.training.checkpoint import Checkpoints, claim_workdir
from jtok_jax.training.evaluate import evaluate
from jtok_jax.training.guards import StallWatch, StopSignal, WorkdirLock
from jtok_jax.training.metrics import (
    MetricsWriter,
    Timer,
    console_line,
    parameter_table,
    step_record,
)
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state, init_state, state_shardings
from jtok_jax.training.step import make_eval_step, make_train_step

CONFIG = config_flags.DEFINE_config_file("config", None, "File in configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints and metrics.")


def train(config: Config, workdir: pathlib.Path) -> None:
    """Train until config.train.steps, or until a signal asks to stop."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(WorkdirLock(workdir))
        stop = stack.enter_context(StopSignal())
        stall = StallWatch(workdir, config.train.stall_seconds)
        # ---------------------------------------------------------------- mesh and data
        mesh = make_mesh(config.mesh)
        check_batch(mesh, "train.batch_size / grad_accumulation",
                    config.train.batch_size // config.train.grad_accumulation)  # fmt: skip
        check_batch(mesh, "evaluation.batch_size", config.evaluation.batch_size)
        source = open_source(config)
        claim_workdir(workdir, config)
        print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {describe(config, mesh)}")
        shards = num_shards(mesh, table_layout(config, mesh).columns)
        print(parameter_table(config, column_shards=shards), flush=True)

        # ---------------------------------------------------------------- model and optimizer
        optimizer = make_optimizer(config)
        shardings = state_shardings(config, optimizer, mesh)
        train_step = jax.jit(
            make_train_step(config, optimizer, mesh),
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=compiler_options(mesh, jax.default_backend()),
        )
        eval_step = jax.jit(make_eval_step(config, mesh))

        # ---------------------------------------------------------------- resume or start
        checkpoints = Checkpoints(workdir, config, data=source.fingerprint)
        stack.callback(checkpoints.close)
        done = checkpoints.latest_step()
        if done is None:
            state = init_state(config, optimizer, mesh)
        else:
            state = checkpoints.restore(abstract_state(config, optimizer, mesh))
            print(f"resumed at step {done}", flush=True)
        steps = config.train.steps
        if done is not None and done >= steps:
            print(f"{workdir} has finished its {steps} steps; nothing to do.")
            return
        writer = MetricsWriter(workdir, resumed_at=done, tensorboard=config.logging.tensorboard)
        stack.callback(writer.close)
        if done is None:
            validation = evaluate(eval_step, state.params, source, mesh)
            writer.write({"step": 0} | validation._asdict())
            _print_validation(0, validation)

        # ---------------------------------------------------------------- loop
        timer = Timer(config)
        batches = train_batches(source, config, first_step=(done or 0) + 1)
        unreported = None  # metrics are fetched a step late: the device never waits for us

        def report(step, batch, metrics, data_wait, *, validate=False):
            """Write down one step, which is waited for; evaluate after it if asked."""
            logged = validate or step % config.train.log_every == 0
            with stall.waiting_for(f"end of step {step}"):
                record = step_record(metrics, step=step, batch=batch, with_health=logged)
            record |= timer.step(data_wait=data_wait)
            if logged or step == 1 or record["bad_in_row"]:
                print(console_line(record, steps=steps), flush=True)
            if validate:
                validation = evaluate(eval_step, state.params, source, mesh)
                record |= validation._asdict()
                _print_validation(step, validation)
            writer.write(record)
            if record["bad_in_row"] >= config.train.max_bad_steps:
                raise NonFiniteError(
                    f"Steps {step - record['bad_in_row'] + 1} to {step}: loss or gradient is not "
                    "finite. No step of these was applied and nothing was saved after them; last "
                    f"checkpoint: {checkpoints.latest_step()}. Lower the learning rate, or look "
                    f"at batch {batch.hash}."
                )

        for step in range((done or 0) + 1, steps + 1):
            asked = time.perf_counter()
            with stall.waiting_for(f"batch for step {step}"):
                batch = next(batches)
            wait = time.perf_counter() - asked
            ids, targets = put_batch(mesh, batch.ids_BT), put_batch(mesh, batch.targets_BT)
            state, metrics = train_step(state, ids, targets)
            if unreported:
                report(*unreported)
            unreported = step, batch, metrics, wait
            checkpoints.check()
            last, stopped_by = step == steps, stop.name  # a signal may arrive at any line below
            evaluating = last or step % config.evaluation.every == 0
            saving = last or stopped_by or step % config.checkpoint.every == 0
            if evaluating or saving:
                report(*unreported, validate=evaluating)
                unreported = None
                if saving:
                    with stall.waiting_for(f"end of the save before step {step}"):
                        checkpoints.wait()
                    with stall.waiting_for(f"completed save at step {step}"):
                        checkpoints.save(state, step)
                        if last or stopped_by:
                            checkpoints.wait()
                timer.restart()
            if stopped_by and not last:
                raise Preempted(f"{stopped_by}: saved step {step}. Run the same command to go on.")
        print(f"finished {steps} steps; checkpoint in {workdir / 'checkpoints' / str(steps)}")


def _print_validation(step: int, validation) -> None:
    print(
        f"step {step}: validation loss {validation.val_loss:.4f} nats/token, "
        f"{validation.val_bpb:.4f} bits/byte",
        flush=True,
    )


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with exit_on_error():
        if len(arguments) > 1:
            raise ConfigError(f"Unexpected argument {arguments[1]!r}; options start with --.")
        for name in ("config", "workdir"):
            if not flags.FLAGS[name].value:
                raise ConfigError(f"--{name} is missing. Example: {__doc__.splitlines()[0]}")
        train(from_config_dict(CONFIG.value), pathlib.Path(WORKDIR.value))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
