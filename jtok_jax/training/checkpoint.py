# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Saves a run asynchronously, and restores it after checking. leaves.py and saved.py read arrays.

A checkpoint is DIR/checkpoints/STEP: the state as a flat dict of arrays by name, and as metadata
the resolved configuration, the data fingerprint and the versions that wrote it.
"""

import contextlib
import json
import logging
import math
import pathlib
from collections.abc import Iterator

import flax
import jax
import numpy as np
import orbax.checkpoint
from orbax.checkpoint import v1 as ocp

import jtok_jax
from jtok_jax.config import Config
from jtok_jax.config_dict import to_dict
from jtok_jax.errors import CheckpointError, NonFiniteError
from jtok_jax.model.params import to_stored
from jtok_jax.store.pieces import STATE, Pieces
from jtok_jax.store.tables import HostTables
from jtok_jax.training.damage import METRICS, open_checkpointer, silence_leftovers
from jtok_jax.training.digest import digests, text_digest
from jtok_jax.training.leaves import (
    DIGEST,
    DIGESTS,
    PARAMS,
    SPARSE,
    load_leaves,
    read_metadata,
    sequences_seen,
)
from jtok_jax.training.resume import (
    CHECKPOINTS,
    require_same_config,
    require_same_data,
)
from jtok_jax.training.state import TrainState, as_saved, named_leaves, non_finite

# Of several processes JAX agrees on the step at which all stop, once, by the steps they ask about.
# The training loop asks; Orbax asks about older steps from a thread, which would undo the count.
orbax.checkpoint.utils.reached_preemption = lambda step: False

_POLL_SECONDS = 1.0
RANKED_BY = "val_loss"  # in the metrics of a checkpoint
_SAVING = ("async_checkpointer", "checkpoint_manager", "future")  # modules of Orbax


class Checkpoints:
    """Saves and restores the checkpoints of one workdir."""

    def __init__(
        self,
        workdir: pathlib.Path,
        config: Config,
        *,
        data: dict[str, str],
        end_id: int | None = None,
    ):
        """Open the folder; `data` is the fingerprint, `end_id` that of its tokenizer.

        history: changes of the configuration, as `restore` finds them. offset: sequences by which
        the data is further on than steps of today's batch_size.
        """
        self.history, self.offset = [], 0
        self._folder = workdir.absolute() / CHECKPOINTS
        self._config, self._data, self._end_id = config, data, end_id
        self._pending, self._failed = None, False
        self._checkpointer = self._open()
        self._log = _FailureLog()

    def _open(self) -> ocp.training.Checkpointer:
        options, policies = self._config.checkpoint, ocp.training.preservation_policies
        preserved = [policies.LatestN(options.keep)]
        if options.keep_every:
            preserved.append(policies.EveryNSteps(options.keep_every))
        if options.keep_best:
            preserved.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[RANKED_BY],
                    reverse=True,  # the lowest last, where Orbax takes the best from
                    n=options.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return open_checkpointer(
            self._folder,
            preservation_policy=policies.AnyPreservationPolicy(preserved),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def has_changed(self, step: int) -> bool:
        """Return whether the configuration is another since the checkpoint of `step`."""
        return bool(self.history) and self.history[-1]["after_step"] == step

    def is_ranked(self) -> bool:
        """Return whether the newest checkpoint has a validation that is finite."""
        latest = self._checkpointer.latest
        return latest is not None and bool(latest.metrics)

    def save(
        self,
        state: TrainState,
        step: int,
        *,
        tables: HostTables | None = None,
        val_loss: float | None = None,
    ) -> None:
        """Start writing `state`; returns once the arrays may change.

        Args:
            tables: those in host memory, under the names they have in a state; waits for the save.
            val_loss: by which checkpoint.keep_best ranks it; None or not finite: it is not ranked.

        Raises:
            CheckpointError: the save before this one failed.
            NonFiniteError: a parameter is not finite, as when an update overflows.
        """
        self.wait()
        state = as_saved(state)
        broken = non_finite(state.params) + (tables.non_finite() if tables else [])
        if broken:
            raise NonFiniteError(
                f"Step {step}: parameters are not finite ({', '.join(broken)}). Not saved; last "
                f"checkpoint: {self.latest_step()}. Lower optimizer.learning_rate."
            )
        finite = val_loss is not None and math.isfinite(val_loss)
        metrics = {RANKED_BY: val_loss} if finite else None
        leaves = named_leaves(state) | (tables.by_name() if tables else {})
        with tables.read_ahead() if tables else contextlib.nullcontext():
            metadata = self._metadata(leaves, step, sparse=bool(tables) and tables.is_sparse)
            with self._failure(step), _files() if tables else contextlib.nullcontext():
                response = self._checkpointer.save_checkpointables_async(
                    step, {STATE: leaves}, metrics=metrics, custom_metadata=metadata
                )
            self._pending = step, response
            if tables:  # a copy of them may not fit
                self.wait()

    def save_params(
        self, params: dict[str, jax.Array | np.ndarray], state: TrainState | None = None
    ) -> None:
        """Write logical parameters as step 0: a run can start from them.

        state: of an optimizer, at step 0, whose moments it can start with too.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        leaves = {PARAMS + name: value for name, value in params.items()}
        leaves |= named_leaves(state._replace(params={})) if state else {}
        piece = lambda x: Pieces.of(x) if isinstance(x, np.ndarray) else x
        leaves = {
            name: piece(value) if np.ndim(value) else jax.numpy.asarray(value)
            for name, value in leaves.items()
        }
        with self._failure(0), _files():
            metadata = self._metadata(leaves, 0)
            self._checkpointer.save_checkpointables(0, {STATE: leaves}, custom_metadata=metadata)

    def _metadata(
        self, leaves: dict[str, jax.Array | Pieces], step: int, *, sparse: bool = False
    ) -> dict[str, object]:
        found = {
            "config": to_dict(self._config),
            "data": self._data,
            "end_id": self._end_id,
            "sequences": step * self._config.train.batch_size + self.offset,
            "history": self.history,
            SPARSE: sparse,
            "jtok_jax": jtok_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            DIGESTS: digests(leaves),
        }
        return found | {DIGEST: text_digest(found)}

    def rank(self, val_loss: float) -> None:
        """Rank the newest checkpoint, whose validation a signal had cut short.

        All processes call this, while no save is under way. Orbax cannot add metrics to a
        checkpoint: process 0 writes them where Orbax does, and all read them again.
        """
        step = self.latest_step()
        if step is None or not math.isfinite(val_loss):
            return
        self._checkpointer.close()
        if jax.process_index() == 0:
            path = self._folder / str(step) / METRICS
            partial = path.with_suffix(".partial")
            with self._failure(step):
                path.parent.mkdir(exist_ok=True)
                partial.write_text(json.dumps({RANKED_BY: val_loss}))
                partial.replace(path)
        self._checkpointer = self._open()  # which waits for process 0

    def check(self, seconds: float = 0.0) -> None:
        """Wait so long for the save under way. Raises CheckpointError if it failed."""
        if self._pending is None:
            return
        step, response = self._pending
        with self._failure(step):
            if self._log.error:
                raise self._log.error
            try:
                response.result(timeout=seconds)
            except TimeoutError as error:
                if error.args:  # one of Orbax's own says what took too long; ours says nothing
                    raise
                return
        self._pending = None

    def wait(self) -> None:
        """Wait for the save under way. Raises CheckpointError if it failed."""
        while self._pending is not None:
            self.check(_POLL_SECONDS)

    def close(self) -> None:
        """Wait for the save under way; after a failure here Orbax would wait for the others."""
        with contextlib.closing(self._log):
            self.wait()
            if not self._failed:
                self._checkpointer.close()

    @contextlib.contextmanager
    def _failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._pending, self._failed = None, True
            what = f"Save of step {step} under {self._folder} failed: {error!r}. Earlier ones are"
            if (self._folder / str(step)).exists():  # it gets its name when all of it is there
                what = f"After the save of step {step} under {self._folder}: {error!r}. It is"
            raise CheckpointError(
                f"{what} intact. Free space or mend the folder, then run the same command again."
            ) from error

    def restore(self, abstract: TrainState, tables: HostTables | None = None) -> TrainState:
        """Return the newest state, in the shardings of `abstract`, after comparing everything.

        tables: those in host memory, which are filled.

        Raises:
            ConfigError: the run was made with another configuration.
            DataError: the data would give other batches.
            CheckpointError: names, shapes or dtypes differ.
            DamagedError: it does not hold what was saved.
        """
        step = self.latest_step()
        found = read_metadata(self._checkpointer, step)
        saved, workdir = found.custom_metadata, self._folder.parent
        changes = require_same_config(saved["config"], self._config, workdir)
        require_same_data(saved["data"], self._data, workdir)
        entry = {"after_step": step, "changes": changes}
        self.history = saved.get("history", []) + [entry] * bool(changes)
        self.offset = sequences_seen(found) - step * self._config.train.batch_size
        logical = as_saved(abstract)
        wanted = named_leaves(logical)
        leaves = load_leaves(self._checkpointer, found, wanted, tables)
        state = jax.tree.unflatten(jax.tree.structure(logical), [leaves[name] for name in wanted])
        return state._replace(params=to_stored(self._config.model, state.params))


def _files() -> ocp.Context:
    """Return Orbax's options for files of each array: OCDBT holds the largest thrice in memory."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    return context


class _FailureLog(logging.Filter):
    """Takes from Orbax's log the first error of a save in the background.

    Of several processes Orbax lets no save end before those of all others have, and the others
    wait for the one that failed: its response would say so after Orbax's limit of 20 minutes.
    """

    def __init__(self):
        super().__init__()
        self.error: BaseException | None = None
        logging.getLogger("absl").addFilter(self)
        silence_leftovers()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is logged: not what becomes an error of ours, or is meant so."""
        if "Skipping merge of OCDBT" in record.getMessage():  # arrays in pieces are none of it
            return False
        if record.levelno < logging.ERROR or not record.exc_info or record.module not in _SAVING:
            return True
        self.error = self.error or record.exc_info[1]
        return False

    def close(self) -> None:
        """Let the log be as it was."""
        logging.getLogger("absl").removeFilter(self)
