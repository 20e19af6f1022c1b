# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""One training step and one evaluation step, as pure functions."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jtok_kernels import RowPlan, mixed
from jtok_kernels.rounding import entry_places, round_at_random, row_seeds

from jtok_jax.config import Config
from jtok_jax.mesh import BATCH, num_shards, split_batch
from jtok_jax.model import host_memory
from jtok_jax.model.loss import LossSums, cross_entropy
from jtok_jax.model.params import Params, bind, declared_tables, to_logical, to_stored
from jtok_jax.model.tables import ROWS, Rows, SomeRows
from jtok_jax.model.transformer import Parallel
from jtok_jax.store.rows import (
    abstract_rows,
    step_shardings,
    whole_leaves,
    with_rows,
)
from jtok_jax.training import rows
from jtok_jax.training.compiler import compiler_options
from jtok_jax.training.optimizer import Optimizer, schedule
from jtok_jax.training.rows import parallel_reads
from jtok_jax.training.state import TrainState, state_shardings


class StepMetrics(NamedTuple):
    """Measurements of one step, float32 scalars if nothing else is said."""

    loss: jax.Array  # cross-entropy, nats per token
    moe_balance: jax.Array  # unweighted sum over layers
    jtok_balance: jax.Array
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    bad_steps: jax.Array
    bad_in_row: jax.Array
    batch_hash: jax.Array  # uint32 [2], the same on any mesh
    unique_ids: jax.Array | None  # int32, different tokens of the batch; None if no table has them
    ngrams: dict[str, jax.Array]  # see `Output.ngrams`


class _Losses(NamedTuple):
    loss: jax.Array
    moe_balance: jax.Array
    jtok_balance: jax.Array
    ngrams: dict[str, jax.Array]


def make_train_step(
    config: Config, optimizer: Optimizer, mesh: Mesh
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, StepMetrics]]:
    """Return step(state, ids_BT, targets_BT) -> (state, metrics), to be jitted.

    1. plan the rows of the whole batch  2. sum gradients over microbatches  3. clip by the norm of
    all of them  4. update the backbone, and the rows of the step  5. keep the old values where
    anything was not finite.
    """
    rate, parallel = schedule(config), parallel_reads(config, mesh)

    def step(
        state: TrainState, ids_BT: jax.Array, targets_BT: jax.Array, some: SomeRows | None = None
    ):
        places, rounding_ids = (some.places, some.ids) if some else (None, None)
        microbatches = jax.tree.map(lambda x: _split(config, x), (ids_BT, targets_BT, places))
        plans = rows.make_plans(config, state.params, microbatches[0], parallel, microbatches[2])
        split = optimizer.split(state.params)
        losses, *grads = _gradients(config, *split, *microbatches, plans, parallel)
        norm = rows.norm(*grads)
        finite = jnp.isfinite(losses.loss) & jnp.isfinite(norm)
        accepted = state.step - state.bad_steps
        scale = _clip_scale(norm, config.optimizer.clip_norm)
        params, opt_state = _update(
            config, optimizer, state, grads, scale, plans, accepted, finite, parallel, rounding_ids
        )
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            bad_steps=state.bad_steps + jnp.where(finite, 0, 1),
            bad_in_row=jnp.where(finite, 0, state.bad_in_row + 1),
        )
        return new, StepMetrics(
            **losses._asdict(),
            grad_norm=norm,
            learning_rate=rate(accepted),
            bad_steps=new.bad_steps,
            bad_in_row=new.bad_in_row,
            batch_hash=batch_hash(ids_BT, targets_BT),
            unique_ids=rows.unique_tokens(plans),
        )

    return step


def make_step_of_rows(
    config: Config, optimizer: Optimizer, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, dict[str, jax.Array]], StepMetrics]]:
    """Return step(state, leaves, ids_BT, targets_BT, some) -> (state, leaves, metrics).

    For tables in host memory: the step of `make_train_step` on the rows of its batch. The state
    lacks tables, and of their optimizer holds scalars alone. Leaves are those of `some`, apart so
    that they can be donated.
    """
    whole_step = make_train_step(config, optimizer, mesh)

    def step(state: TrainState, leaves, ids_BT: jax.Array, targets_BT: jax.Array, some: SomeRows):
        tables = {name: one[ROWS] for name, one in leaves.items()}
        states = {
            name: state.opt_state[name] | {leaf: x for leaf, x in one.items() if leaf != ROWS}
            for name, one in leaves.items()
        }
        if not config.mesh.table_streaming:
            tables = to_stored(config.model, tables)
        params = state.params | tables
        whole = state._replace(params=params, opt_state=state.opt_state | states)
        new, metrics = whole_step(whole, ids_BT, targets_BT, some)
        tables = to_logical({name: new.params[name] for name in leaves})
        new_leaves, scalars = {}, {}
        for name, one in leaves.items():
            found = new.opt_state[name] | {ROWS: tables[name]}
            new_leaves[name] = {leaf: found[leaf] for leaf in one}
            scalars[name] = {leaf: found[leaf] for leaf in state.opt_state[name]}
        params = {name: new.params[name] for name in state.params}
        new = new._replace(params=params, opt_state=new.opt_state | scalars)
        return new, new_leaves, metrics

    return step


def jit_train_step(
    config: Config, optimizer: Optimizer, mesh: Mesh, *, platform: str | None = None
) -> Callable:
    """Return the step as a run compiles it: the state is donated and stays where it lies.

    That is `make_train_step`, or for tables in host memory `make_step_of_rows`.

    Args:
        platform: of the devices of `mesh`; None: that of this process.

    Raises:
        ConfigError: the compiler does not take train.compiler_options.
    """
    shardings = state_shardings(config, optimizer, mesh)
    if config.mesh.table_memory == "host":
        step, donated = make_step_of_rows(config, optimizer, mesh), (0, 1)
        leaves = step_shardings(config, mesh, whole_leaves(config.model, optimizer.rows))
        results = shardings, leaves if config.mesh.table_streaming else None, None
    else:
        step, donated, results = make_train_step(config, optimizer, mesh), 0, (shardings, None)
    return jax.jit(
        step,
        donate_argnums=donated,
        out_shardings=results,
        compiler_options=compiler_options(config, mesh, platform or jax.default_backend()),
    )


def step_arguments(config: Config, optimizer: Optimizer, mesh: Mesh, state: TrainState) -> tuple:
    """Return what `jit_train_step` is lowered with: `state`, and shapes of all else."""
    ids_BT = _abstract_ids(config, mesh)
    if config.mesh.table_memory != "host":
        return state, ids_BT, ids_BT
    some = abstract_rows(config, mesh, optimizer.rows)
    return state, some.leaves, ids_BT, ids_BT, some._replace(leaves={})


def health_arguments(config: Config, optimizer: Optimizer, mesh: Mesh, state: TrainState) -> tuple:
    """Return what `make_health_step`, jitted, is lowered with."""
    on_host = config.mesh.table_memory == "host"
    rows = (abstract_rows(config, mesh, optimizer.rows),) * on_host
    return state.params, _abstract_ids(config, mesh), *rows


def _abstract_ids(config: Config, mesh: Mesh) -> jax.ShapeDtypeStruct:
    shape = config.train.batch_size, config.train.seq_len
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split_batch(mesh))


def batch_hash(ids_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return uint32 [2], changed by any token or its place, the same however the batch is split.

    A sum modulo 2^32 of words that each depend on a token and its place: order does not matter.
    """
    tokens = jnp.stack([ids_BT, targets_BT]).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, tokens.size).reshape(tokens.shape)
    word = lambda seed: mixed(mixed(place + jnp.uint32(seed)) ^ tokens).sum(dtype=jnp.uint32)
    return jnp.stack([word(0x9E3779B9), word(0x7F4A7C15)])


def _clip_scale(norm: jax.Array, limit: float) -> jax.Array:
    """Return what gradients of this norm are multiplied by to keep within `limit`; 0: no limit."""
    return jnp.where(norm > limit, limit / norm, 1.0) if limit else jnp.float32(1)


def _update(
    config: Config,
    optimizer: Optimizer,
    state: TrainState,
    grads: tuple[Params, Params],
    scale: jax.Array,
    plans: dict[str, RowPlan],
    accepted: jax.Array,
    finite: jax.Array,
    parallel: Parallel | None,
    rounding_ids: dict[str, jax.Array] | None,
) -> tuple[Params, dict[str, object]]:
    """Return parameters and optimizer state after one more accepted step, or as they were."""
    backbone, others = optimizer.split(state.params)
    backbone_grads, row_grads = grads
    backbone_grads = jax.tree.map(lambda leaf: leaf * scale, backbone_grads)
    old = state.opt_state["backbone"]
    key = jax.random.fold_in(jax.random.key(config.train.seed), accepted)
    masters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), backbone)
    updates, new = optimizer.backbone.update(backbone_grads, old, masters)
    new_backbone = _stored(optax.apply_updates(masters, updates), backbone, key)
    params, new = _where(finite, (new_backbone, new), (backbone, old))
    new_tables, states = rows.update_tables(
        config, optimizer, others, state.opt_state, row_grads, plans, parallel,
        rounding_key=key,
        rounding_ids=rounding_ids,
        step=accepted + 1,
        learning_rate=schedule(config)(accepted),
        grad_scale=scale,
        apply=finite,
    )  # fmt: skip
    return others | params | new_tables, {"backbone": new} | states


def _stored(params: Params, like: Params, key: jax.Array) -> Params:
    """Return float32 parameters in the dtypes of `like`; to bfloat16 at random, right on average.

    To the nearest would undo most steps: they are smaller than half a unit of the last place.
    """
    seed = jax.random.bits(key, (2,), jnp.uint32)

    def stored(number, name):
        value = params[name]
        if like[name].dtype == value.dtype:
            return value
        return round_at_random(value, row_seeds(seed, number, 0), entry_places(value.shape))

    return {name: stored(number, name) for number, name in enumerate(sorted(params))}


def make_eval_step(config: Config, mesh: Mesh) -> Callable[..., LossSums]:
    """Return step(params, ids_BT, targets_BT, weights_BT) -> sums over the weighted tokens.

    Of tables in host memory the rows of the batch are another argument.
    """
    parallel = parallel_reads(config, mesh)

    def step(
        params: Params, ids_BT, targets_BT, weights_BT, some: SomeRows | None = None
    ) -> LossSums:
        params, places = with_rows(config.model, params, some)
        model = bind(config.model, params)
        hidden = model(ids_BT, parallel=parallel, places=places).hidden_BTD
        return _loss_of(config, hidden, model.head_DV, targets_BT, weights_BT, parallel)[1]

    return step


def make_health_step(config: Config, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """Return step(params, ids_BT) -> what docs/runs.md calls health, by name.

    A forward pass of its own over one sequence a device: a step that nobody looks at pays nothing.
    """
    parallel = parallel_reads(config, mesh)

    def step(
        params: Params, ids_BT: jax.Array, some: SomeRows | None = None
    ) -> dict[str, jax.Array]:
        params, places = with_rows(config.model, params, some)
        shorter = lambda x: jax.lax.with_sharding_constraint(
            x[:: ids_BT.shape[0] // num_shards(mesh, BATCH)], split_batch(mesh)
        )
        ids_BT, places = jax.tree.map(shorter, (ids_BT, places))
        model = bind(config.model, params)
        return model(ids_BT, parallel=parallel, places=places, with_health=True).health

    return step


def _split(config: Config, array_BT: jax.Array) -> jax.Array:
    """Return [N, B / N, T, ...], one entry a microbatch.

    Its sequences are strided, so that a batch split over devices stays where it is.
    """
    count = config.train.grad_accumulation
    return array_BT.reshape(-1, count, *array_BT.shape[1:]).swapaxes(0, 1)


def _gradients(
    config: Config,
    backbone: Params,
    others: Params,
    ids_NBT: jax.Array,
    targets_NBT: jax.Array,
    places: dict[str, jax.Array] | None,
    plans: dict[str, RowPlan],
    parallel: Parallel | None,
) -> tuple[_Losses, Params, Params]:
    """Return losses, gradients of the backbone, and row gradients [G, (M,) U, D] by table.

    Averaged over the microbatches, float32.
    """
    zeros_of_rows = rows.zero_row_grads(config, plans, parallel)
    value_and_grad = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)

    def microbatch(ids, targets, places, orders):
        mine = {key: plan._replace(order=orders[key]) for key, plan in plans.items()}
        arguments = config, others, ids, targets, places, mine, parallel
        (_, losses), grads = value_and_grad(backbone, zeros_of_rows, *arguments)
        return losses, grads

    arrays = ids_NBT, targets_NBT, places, {key: plan.order for key, plan in plans.items()}
    count = config.train.grad_accumulation
    first = jax.tree.map(lambda x: x[0], arrays)
    if count == 1:
        losses, grads = microbatch(*first)
    else:
        losses, (of_backbone, _) = jax.eval_shape(microbatch, *first)
        zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)
        total = zeros(losses), (zeros(of_backbone), zeros_of_rows)
        sum_of = functools.partial(host_memory.elementwise, jnp.add)
        add = lambda total, xs: (jax.tree.map(sum_of, total, microbatch(*xs)), None)
        total, _ = jax.lax.scan(add, total, arrays)
        mean = lambda leaf: host_memory.elementwise(lambda x: x / count, leaf)
        losses, grads = jax.tree.map(mean, total)
    backbone_grads, row_grads = grads
    backbone_grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), backbone_grads)
    declarations = declared_tables(config.model)
    stacked = {name: rows.of_stack(declarations[name], grad) for name, grad in row_grads.items()}
    return losses, backbone_grads, stacked


def _loss(backbone, row_grads, config: Config, others, ids_BT, targets_BT, places, plans, parallel):
    model = bind(config.model, backbone | others)
    training = Rows(plans, row_grads)
    output = model(ids_BT, training=training, parallel=parallel, places=places)
    ones = jnp.ones(targets_BT.shape, jnp.float32)
    mean, sums = _loss_of(config, output.hidden_BTD, model.head_DV, targets_BT, ones, parallel)
    total = (
        mean
        + config.model.moe.balance_weight * output.moe_balance
        + config.model.jtok.balance_weight * output.jtok_balance
    )
    return total, _Losses(
        loss=sums.nats / sums.weight,
        moe_balance=output.moe_balance,
        jtok_balance=output.jtok_balance,
        ngrams=output.ngrams,
    )


def _loss_of(
    config: Config, hidden_BTD, head_DV, targets_BT, weights_BT, parallel: Parallel | None
):
    return cross_entropy(
        hidden_BTD,
        head_DV,
        targets_BT,
        weights_BT,
        vocab_size=config.model.vocab_size,
        chunk=config.model.loss_chunk,
        z_loss=config.train.z_loss,
        mesh=parallel and parallel.mesh,
    )


def _where(condition: jax.Array, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
