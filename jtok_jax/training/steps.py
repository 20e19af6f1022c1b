# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The steps of a run, compiled for its devices; with tables in host memory, where there are any."""

from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from jtok_jax.config import Config
from jtok_jax.data.loader import Batch
from jtok_jax.mesh import replicated
from jtok_jax.model import host_memory
from jtok_jax.model.params import Params
from jtok_jax.store.feed import RowFeed
from jtok_jax.store.mapped import Contents
from jtok_jax.store.tables import HostTables
from jtok_jax.training.optimizer import Optimizer
from jtok_jax.training.state import TrainState
from jtok_jax.training.step import (
    StepMetrics,
    health_arguments,
    jit_train_step,
    make_eval_step,
    make_health_step,
    step_arguments,
)


class Steps:
    """Takes the steps of a run: training, health, evaluation.

    tables: those in host memory; None: the state has them all.
    """

    def __init__(self, config: Config, optimizer: Optimizer, mesh: Mesh, workdir: str = ""):
        """Prepare them; `workdir` is that of the run whose tables may lie in files."""
        self._config, self._optimizer, self._mesh = config, optimizer, mesh
        if config.mesh.table_streaming:
            host_memory.require(mesh)
        self._train = jit_train_step(config, optimizer, mesh)
        everywhere = replicated(mesh)
        self._health = jax.jit(make_health_step(config, mesh), out_shardings=everywhere)
        self.evaluate = jax.jit(make_eval_step(config, mesh), out_shardings=everywhere)
        self.tables = self._feed = None
        if config.mesh.table_memory == "host":
            contents = Contents(f"the run {workdir}, in training", {"run": workdir})
            self.tables = HostTables(config, mesh, optimizer.rows, contents=contents)
            self._feed = RowFeed(config, mesh, self.tables)

    @property
    def rows_of(self) -> Callable | None:
        """Return what fetches the rows of a batch that is evaluated; None: the state has them."""
        return self._feed and self._feed.fetch

    def initialise_tables(self) -> None:
        """Draw the first rows of tables in host memory."""
        if self.tables:
            self.tables.initialise()

    def find_ngrams_with(self, params: Params) -> None:
        """Take from parameters what frequent n-grams are found with where rows are read ahead."""
        if self._feed:
            self._feed.find_ngrams_with(params)

    def compile(self, state: TrainState) -> None:
        """Compile the training and the health step for `state`.

        For the state itself, not its shapes: an executable takes the very layouts it was made for,
        and raises where a jitted function would compile again.
        """
        known = self._config, self._optimizer, self._mesh, state
        self._train = self._train.lower(*step_arguments(*known)).compile()
        self._health = self._health.lower(*health_arguments(*known)).compile()

    def read_ahead(
        self, batches: Iterator[Batch], *, first_step: int
    ) -> Iterator[tuple[Batch, tuple]]:
        """Yield each batch, and in a tuple its rows where they come from host memory."""
        if self._feed:
            return self._feed.read_ahead(batches, first_step=first_step)
        return ((batch, ()) for batch in batches)

    def train(self, state: TrainState, batch: tuple) -> tuple[TrainState, StepMetrics]:
        """Return the state after a step that is queued; the device works on it."""
        if not self._feed:
            return self._train(state, *batch)
        ids_BT, targets_BT, some = batch
        known = some._replace(leaves={})
        state, leaves, metrics = self._train(state, some.leaves, ids_BT, targets_BT, known)
        self._feed.give_back(leaves)
        return state, metrics

    def health(self, state: TrainState, batch: tuple) -> dict[str, jax.Array]:
        """Return what docs/runs.md calls health, before a step on `batch`."""
        ids_BT, _, *some = batch
        return self._health(state.params, ids_BT, *some)

    def settle(self) -> None:
        """Wait until tables in host memory are those after the last step."""
        if self._feed:
            self._feed.settle()

    def close(self) -> None:
        """Settle, and end what reads ahead."""
        if self._feed:
            self._feed.close()
            self.tables.close()
