# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The run that the loop of train.py drives: its devices, data, steps, checkpoints and metrics."""

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from jtok_jax.config import Config
from jtok_jax.config_dict import flatten, to_dict
from jtok_jax.data.loader import open_source, train_batches
from jtok_jax.errors import ConfigError, DamagedError, DataError, Preempted
from jtok_jax.hosts import Hosts, code_and_versions
from jtok_jax.lock import LOCK_FILE, locked
from jtok_jax.mesh import check_batches, make_mesh, put_batch, rows_here
from jtok_jax.model.params import Params
from jtok_jax.model.placement import describe, table_operations
from jtok_jax.store.rows import require_trainable
from jtok_jax.training import guards
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.evaluate import evaluate
from jtok_jax.training.frequent import open_frequent, with_absolute_paths, with_frequent
from jtok_jax.training.metrics import (
    Timer,
    Writer,
    console_line,
    open_writers,
    parameter_table,
    step_record,
)
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.resume import (
    CHECKPOINTS,
    claim_workdir,
    keep_config,
    keep_history,
    keep_tokenizer,
)
from jtok_jax.training.state import TrainState, abstract_state, init_state
from jtok_jax.training.step import StepMetrics
from jtok_jax.training.steps import Steps
from jtok_jax.training.warm_start import begin_with, require_same_words


@contextlib.contextmanager
def open_run(config: Config, workdir: pathlib.Path, hosts: Hosts) -> Iterator["Run"]:
    """Open the run of `workdir`, locked; at the end wait for its last save.

    Raises:
        WorkdirError: another trainer has the workdir; nothing was touched.
        ConfigError, DataError, HostError: processes, devices, data or workdir do not fit.
    """
    with contextlib.ExitStack() as stack:
        if hosts.lead:
            stack.enter_context(locked(workdir / LOCK_FILE))
        hosts.agree("code and versions", code_and_versions(), ConfigError)
        hosts.agree("configuration", flatten(to_dict(config)), ConfigError)
        hosts.check_shared(workdir / LOCK_FILE)
        config = with_absolute_paths(config)  # what reads the run may be elsewhere
        stop = stack.enter_context(guards.StopSignal())
        stall = guards.StallWatch(
            workdir / guards.STALL_FILE, config.train.stall_seconds, hosts.announce
        )
        run = Run(config, workdir, hosts, stop, stall)
        stack.callback(run.close_checkpoints)
        stack.push(hosts.leave_if_alone)
        stack.callback(run.close_writers)
        stack.callback(run.end_profile)
        yield run


class _Pending(NamedTuple):
    """A step that was started and not yet reported."""

    step: int
    metrics: StepMetrics
    health: dict[str, object]
    data_wait: float  # seconds


class Run:
    """A run on its devices; the caller holds the state, as every step donates it.

    What waits for devices, files or other processes does so under the stall watch.
    """

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        hosts: Hosts,
        stop: guards.StopSignal,
        stall: guards.StallWatch,
    ):
        self.config, self.workdir, self.hosts = config, workdir, hosts
        self.stop, self._stall = stop, stall
        with stall.waiting_for("devices of all processes"):
            self._mesh = make_mesh(config.mesh)
        size = config.train.batch_size
        reads = len(rows_here(self._mesh, size, whole=config.mesh.table_memory == "host"))
        hosts.stage(
            f"has {jax.local_device_count()} of {jax.device_count()} devices and reads {reads} of "
            f"{size} sequences of a batch"
        )
        check_batches(config, self._mesh)
        require_trainable(config)
        if config.init_from and not any((workdir / CHECKPOINTS).glob("*")):
            require_same_words(config)
        self._source = open_source(config)
        begins, end_id = config.model.document_id, self._source.end_id
        if begins >= 0 and end_id not in (None, begins):
            raise ConfigError(
                f"model.document_id is {begins}, but documents of the data begin with {end_id}."
            )
        self._ngrams = open_frequent(config, self._source.fingerprint)
        of_ngrams = {"ngrams": self._ngrams.digest} if self._ngrams else {}
        self._fingerprint = self._source.fingerprint | of_ngrams
        if self._source.note:
            hosts.say(self._source.note)
        if hosts.lead:
            claim_workdir(workdir, config)
            keep_tokenizer(workdir, self._source.tokenizer)
        self._print_model()
        self._optimizer = make_optimizer(config)
        self.steps = Steps(config, self._optimizer, self._mesh, str(workdir.absolute()))
        self.checkpoints = self._open_checkpoints()
        self.first_step, self.validation_due = self._begin()
        self._timer, self._data_wait = Timer(config), 0.0
        self._writers: list[Writer] = []
        self._tracing = self._changed = False
        self._pending: _Pending | None = None
        self._val_loss: float | None = None  # after the newest step that was reported

    def _print_model(self) -> None:
        config, mesh, kind = self.config, self._mesh, jax.devices()[0].device_kind
        self.hosts.say(f"{jax.device_count()} x {kind}, {describe(config, mesh)}")
        self.hosts.say(parameter_table(config, table_operations(config, mesh)))

    # ------------------------------------------------------------------ before the loop

    def restore_or_init(self) -> TrainState:
        """Return the state of the newest checkpoint, or a fresh one; all processes agree on it."""
        facts = {"last step": self.first_step - 1, "validation due": self.validation_due}
        self.hosts.agree("data and checkpoint", self._fingerprint | facts, DataError)
        state = self._initial_state() if self.first_step == 1 else self._resumed_state()
        self.steps.find_ngrams_with(state.params)
        return state

    def _initial_state(self) -> TrainState:
        state = init_state(self.config, self._optimizer, self._mesh)
        self.steps.initialise_tables()
        known = self.config, self._mesh
        if self.config.init_from:
            with self._stall.waiting_for(f"parameters of {self.config.init_from}"):
                state = begin_with(*known, state, self.steps.tables, self.hosts.say)
        return state._replace(params=with_frequent(*known, state.params, self._ngrams))

    def _resumed_state(self) -> TrainState:
        state = self._restore()
        self.hosts.say(f"resumed at step {self.first_step - 1}")
        self._source.offset = self.checkpoints.offset
        self._changed = self.checkpoints.has_changed(self.first_step - 1)
        if self._changed and not self.is_finished():
            self.hosts.say("changed: " + "; ".join(self.checkpoints.history[-1]["changes"]))
        if not self._changed and self.hosts.lead:  # else a kill after a change would keep the old
            keep_config(self.workdir, self.config)
        return state

    def _begin(self) -> tuple[int, bool]:
        """Return the step after the newest checkpoint, and whether that lacks its validation."""
        saved = self.checkpoints.latest_step() or 0
        ranked = self.checkpoints.is_ranked()  # else a signal ended the validation
        return saved + 1, self.evaluation_due(saved) and not ranked

    def _restore(self) -> TrainState:
        """Return the state of the newest checkpoint that is sound; damaged ones are set aside.

        Raises:
            DamagedError: there is no other, or several processes would have to agree on it.
        """
        abstract = abstract_state(self.config, self._optimizer, self._mesh)
        while True:
            try:
                with self._stall.waiting_for(f"restored checkpoint of step {self.first_step - 1}"):
                    return self.checkpoints.restore(abstract, self.steps.tables)
            except DamagedError as error:
                self.checkpoints.close()
                self._set_aside(error)
                self.checkpoints = self._open_checkpoints()
                self.first_step, self.validation_due = self._begin()

    def _open_checkpoints(self) -> Checkpoints:
        """Open those of the workdir; of which Orbax cannot read the metadata are set aside."""
        data = {"data": self._fingerprint, "end_id": self._source.end_id}
        while True:
            try:
                return Checkpoints(self.workdir, self.config, **data)
            except DamagedError as error:
                self._set_aside(error)

    def _set_aside(self, error: DamagedError) -> None:
        """Rename a damaged checkpoint to STEP.bad.

        Raises:
            DamagedError: there is no other, or several processes would have to agree on it.
        """
        if error.other is None or self.hosts.count > 1:
            raise error
        self.hosts.say(f"{error}\nSet aside as {error.folder.name}.bad.")
        error.folder.rename(error.folder.with_suffix(".bad"))

    def is_finished(self) -> bool:
        """Return whether all steps are taken and the last validation is made."""
        return self.first_step > self.config.train.steps and not self.validation_due

    def open_writers(self) -> None:
        """Open metrics.jsonl and the other writers, on one process of all."""
        if self.hosts.lead:
            first = self.first_step if self.first_step > 1 else 0  # 0: the validation before step 1
            self._writers = open_writers(self.config, self.workdir, first)

    def close_writers(self) -> None:
        """Close what `open_writers` opened."""
        for writer in self._writers:
            writer.close()

    def close_checkpoints(self) -> None:
        """Wait for the last save."""
        self.steps.close()
        with self._stall.waiting_for("end of the last save"):
            self.checkpoints.close()

    def compile(self, state: TrainState) -> None:
        """Compile the training and the health step, so that the time of no step contains it."""
        began = time.perf_counter()
        self.hosts.say("compiling the step ...")
        with self._stall.waiting_for("compiled step"):
            self.steps.compile(state)
        self.hosts.say(f"compiled the step in {time.perf_counter() - began:.1f} s")

    def validate_first(self, state: TrainState) -> None:
        """Validate the state that the run goes on from.

        Raises:
            Preempted: a signal came meanwhile; nothing is lost.
            NonFiniteError: the run is at its last step and the loss is not finite.
        """
        step = self.first_step - 1
        values = self._validate(step, state.params)
        if not values:
            asked = self.stop.agreed
            raise Preempted(f"{asked} while validating step {step}. Run the same command.")
        record, saved = {"step": step} | values, self.checkpoints.latest_step
        guards.require_sound(record, self.config, saved)  # else it would count as made
        self._write(step, values)
        with self._stall.waiting_for(f"rank of checkpoint {step}"):
            self.checkpoints.rank(values["val_loss"])

    # ------------------------------------------------------------------ the loop

    def batches(self) -> Iterator[tuple[int, tuple]]:
        """Yield every step to take with what it takes, read ahead.

        That are ids and targets, int32 [B, T], and of tables in host memory their `SomeRows`.
        """
        size, first = self.config.train.batch_size, self.first_step
        rows = rows_here(self._mesh, size, whole=self.steps.rows_of is not None)
        batches = train_batches(self._source, self.config, rows, first_step=first)
        batches = self.steps.read_ahead(batches, first_step=first)
        self._timer.start()
        for step in range(first, self.config.train.steps + 1):
            self._profile(step)
            began = time.perf_counter()
            with self._stall.waiting_for(f"batch for step {step}"):
                batch, some = next(batches)
            self._data_wait = time.perf_counter() - began
            arrays = [put_batch(self._mesh, array, size=size) for array in batch]
            yield step, (*arrays, *some)

    def _profile(self, step: int) -> None:
        """Begin a trace before the first step of profile.steps, and end it after the last."""
        window = self.config.profile.window
        if window and self.hosts.lead and step == window[0]:
            jax.profiler.start_trace(self.workdir / "profile")
            self._tracing = True
        if self._tracing and step > window[1]:
            self._report_pending()  # waits for the last one
            self.end_profile()

    def end_profile(self) -> None:
        """Write the trace under way, if there is one."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def log_due(self, step: int) -> bool:
        """Return whether `step` is shown, with the health before it."""
        return self.evaluation_due(step) or step % self.config.train.log_every == 0

    def evaluation_due(self, step: int) -> bool:
        """Return whether a validation follows `step`."""
        return self._is_last(step) or step % self.config.evaluation.every == 0

    def save_due(self, step: int) -> bool:
        """Return whether a checkpoint follows `step`: it is its turn, or a signal asks to stop."""
        regular = self._is_last(step) or step % self.config.checkpoint.every == 0
        return regular or self.stop.agreed is not None

    def _is_last(self, step: int) -> bool:
        return step == self.config.train.steps

    def report(self, step: int, metrics: StepMetrics, health: dict[str, jax.Array]) -> None:
        """Report the step before `step`, which is queued: the device never waits for us.

        The health of `step` is waited for as well, so that its time can be left out.
        """
        self._report_pending()
        if health:
            with self._timer.left_out(), self._stall.waiting_for(f"health before step {step}"):
                health = jax.device_get(health)
        self._pending = _Pending(step, metrics, health, self._data_wait)

    def evaluate(self, state: TrainState) -> None:
        """Report the step that led to `state`, with a validation unless a signal ends it."""
        self._report_pending(state.params)

    def save(self, step: int, state: TrainState) -> None:
        """Save `state` in the background, but wait for the last save of the process."""
        self._report_pending()  # what is not sound is not saved
        with self._timer.left_out():
            with self._stall.waiting_for(f"end of the save before step {step}"):
                self.checkpoints.wait()
            with self._stall.waiting_for(f"completed save at step {step}"):
                self.steps.settle()
                tables = self.steps.tables
                self.checkpoints.save(state, step, tables=tables, val_loss=self._val_loss)
                if self._is_last(step) or self.stop.agreed or self._changed:
                    self.checkpoints.wait()
        if self._changed and self.hosts.lead:  # from now on the old values are those that differ
            keep_config(self.workdir, self.config)
            keep_history(self.workdir, self.checkpoints.history)
        self._changed = False

    def raise_if_stopped(self, step: int) -> None:
        """Raise Preempted if a signal asked to stop, unless the run has ended anyway."""
        ended = self._is_last(step) and self._val_loss is not None
        if self.stop.agreed and not ended:
            asked = self.stop.agreed
            raise Preempted(f"{asked}: saved step {step}. Run the same command to go on.")

    def _report_pending(self, params: Params | None = None) -> None:
        """Wait for the pending step and write it, with a validation of `params` if given."""
        if self._pending is None:
            return
        (step, metrics, health, data_wait), self._pending = self._pending, None
        with self._stall.waiting_for(f"end of step {step}"):
            values = step_record(metrics, health)
        values |= self._timer.step(data_wait=data_wait)
        if health or step == 1 or values["bad_in_row"]:
            steps = self.config.train.steps
            left = self._timer.seconds_for(steps - step)
            self.hosts.say(console_line(step, values, steps=steps, seconds_left=left))
        if params is not None:
            with self._timer.left_out():
                values |= self._validate(step, params)
        self._val_loss = values.get("val_loss")
        self._write(step, values)
        record = {"step": step} | values
        guards.require_sound(record, self.config, self.checkpoints.latest_step)

    def _validate(self, step: int, params: Params) -> dict[str, float]:
        """Return the validation of `params`, those after `step`; {} if a signal ended it."""
        validation = evaluate(
            self.steps.evaluate,
            params,
            self._source,
            self._mesh,
            batch_size=self.config.evaluation.batch_size,
            waiting_for=self._stall.waiting_for,
            stop=self.stop.reached,
            rows_of=self.steps.rows_of,
        )
        if validation is None:
            return {}
        self.hosts.say(f"step {step}: {validation:.4f}")
        return validation._asdict()

    def _write(self, step: int, values: dict[str, object]) -> None:
        for writer in self._writers:
            writer.write(step, values)
