# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jtok_kernels import RowPlan, dense_gradient, row_plan

from jtok_jax.config import Config, ModelConfig
from jtok_jax.mesh import split_batch
from jtok_jax.model.loss import LossSums, cross_entropy
from jtok_jax.model.params import Params, bind
from jtok_jax.training.optimizer import schedule
from jtok_jax.training.state import TrainState


class StepMetrics(NamedTuple):
    """Measurements of one step, float32 scalars, and `health` by name, mostly one value a layer."""

    loss: jax.Array  # cross-entropy, nats per token
    moe_balance: jax.Array  # unweighted sum over layers
    jtok_balance: jax.Array
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    bad_steps: jax.Array
    bad_in_row: jax.Array
    health: dict[str, jax.Array]


class _Losses(NamedTuple):
    loss: jax.Array
    moe_balance: jax.Array
    jtok_balance: jax.Array
    health: dict[str, jax.Array]


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, StepMetrics]]:
    """step(state, ids_BT, targets_BT) -> (state, metrics), to be jitted with the state donated.

    1. plan the rows of the whole batch  2. sum gradients over microbatches  3. turn row gradients
    into table gradients  4. update  5. keep the old state where anything was not finite.
    """
    rate = schedule(config)

    def step(state: TrainState, ids_BT: jax.Array, targets_BT: jax.Array):
        plan = _plan(config.model, ids_BT)
        losses, grads = _gradients(config, state.params, ids_BT, targets_BT, plan, mesh)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(losses.loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = _where(finite, (params, opt_state), (state.params, state.opt_state))
        bad = jnp.where(finite, 0, 1)
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            bad_steps=state.bad_steps + bad,
            bad_in_row=jnp.where(finite, 0, state.bad_in_row + 1),
        )
        accepted = state.step - state.bad_steps
        counts = rate(accepted), new.bad_steps, new.bad_in_row
        return new, StepMetrics(*losses[:3], norm, *counts, losses.health)

    return step


def make_eval_step(config: ModelConfig, mesh: Mesh) -> Callable[..., LossSums]:
    """step(params, ids_BT, targets_BT, weights_BT) -> sums over the weighted tokens."""

    def step(params: Params, ids_BT, targets_BT, weights_BT) -> LossSums:
        model = bind(config, params)
        hidden = model(ids_BT, constrain=_constrain(mesh)).hidden_BTD
        chunk = config.loss_chunk
        return cross_entropy(hidden, model.head_DV, targets_BT, weights_BT, chunk=chunk)

    return step


def _plan(config: ModelConfig, ids_BT: jax.Array) -> RowPlan:
    """The row plan of a step; without tables it is made all the same, and never used."""
    return row_plan(ids_BT, num_rows=config.vocab_size)


def _gradients(
    config: Config,
    params: Params,
    ids_BT: jax.Array,
    targets_BT: jax.Array,
    plan: RowPlan,
    mesh: Mesh,
) -> tuple[_Losses, Params]:
    """Losses and float32 gradients, averaged over the microbatches."""
    backbone = {name: value for name, value in params.items() if name != "tables"}
    row_grads = _zero_row_grads(config.model, plan)
    value_and_grad = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True, allow_int=True)

    def microbatch(ids, targets, place):
        arguments = config, params.get("tables"), ids, targets, plan._replace(place=place), mesh
        (_, losses), grads = value_and_grad(backbone, row_grads, *arguments)
        return losses, grads

    count = config.train.grad_accumulation
    arrays = ids_BT, targets_BT, plan.place
    if count == 1:
        losses, grads = microbatch(*arrays)
    else:
        # Rows of a microbatch are strided, so a batch split over devices stays where it is.
        split = [x.reshape(-1, count, x.shape[1]).swapaxes(0, 1) for x in arrays]
        shapes = jax.eval_shape(microbatch, *[x[0] for x in split])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        add = lambda total, xs: (jax.tree.map(jnp.add, total, microbatch(*xs)), None)
        total, _ = jax.lax.scan(add, zeros, split)
        losses, grads = jax.tree.map(lambda leaf: leaf / count, total)
    backbone_grads, row_grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
    if row_grads is None:
        return losses, backbone_grads
    model = config.model
    tables = dense_gradient(
        row_grads,
        plan.unique_U,
        stack_of_layer=model.jtok.table_of_layer(model.num_layers),
        num_rows=model.vocab_size,
    )
    return losses, backbone_grads | {"tables": tables}


def _zero_row_grads(config: ModelConfig, plan: RowPlan) -> jax.Array | None:
    if config.tables_shape is None:
        return None
    _, num_tables, _, dim = config.tables_shape
    shape = (config.num_layers, num_tables, plan.unique_U.shape[0], dim)
    return jnp.zeros(shape, jnp.float32)


def _loss(backbone, row_grads, config: Config, tables, ids_BT, targets_BT, plan, mesh):
    params = backbone if tables is None else backbone | {"tables": tables}
    model = bind(config.model, params)
    output = model(ids_BT, plan=plan, row_grads_LMUD=row_grads, constrain=_constrain(mesh))
    ones = jnp.ones(targets_BT.shape, jnp.float32)
    sums = cross_entropy(
        output.hidden_BTD, model.head_DV, targets_BT, ones, chunk=config.model.loss_chunk
    )
    loss = sums.nats / sums.weight
    total = (
        loss
        + config.train.z_loss * sums.z / sums.weight
        + config.model.moe.balance_weight * output.moe_balance
        + config.model.jtok.balance_weight * output.jtok_balance
    )
    return total, _Losses(loss, output.moe_balance, output.jtok_balance, output.health)


def _constrain(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Keep the batch split; left alone the partitioner may gather it to split D instead."""
    return lambda x: jax.lax.with_sharding_constraint(x, split_batch(mesh))


def _where(condition: jax.Array, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
