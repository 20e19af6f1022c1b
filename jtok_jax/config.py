# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The one place that knows every option: frozen dataclasses, their defaults and their checks.

A file in configs/ changes fields of `base_config()`; `config_dict.py` reads the result. Fields that
the paper (arXiv 2602.00800) leaves open are marked "open".
"""

import dataclasses

import ml_collections

from jtok_jax.arms import ArmsConfig
from jtok_jax.errors import ConfigError


def _one_of(value: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")


def _at_least(config: object, prefix: str, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise ConfigError(f"{prefix}.{name} is {value}; expected at least {minimum}.")


def _check_betas(config: object, prefix: str) -> None:
    for name in ("b1", "b2"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{prefix}.{name} is {value}; expected at least 0 and less than 1.")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Mixture-of-experts feed-forward; `num_experts` 0 means a dense feed-forward."""

    num_experts: int = 0  # routed experts
    top_k: int = 2  # routed experts a token uses
    expert_dim: int = 256  # width of one routed expert
    shared_dim: int = 0  # width of the shared expert every token uses; 0: none
    renormalize: bool = True  # chosen weights are divided by their sum
    balance_weight: float = 0.01  # weight of the balance loss, summed over layers
    router_init_std: float = 0.02

    def __post_init__(self):
        _at_least(self, "model.moe", 0, "num_experts", "shared_dim", "balance_weight")
        if self.num_experts == 0:
            return
        _at_least(self, "model.moe", 1, "top_k", "expert_dim")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"model.moe.top_k is {self.top_k} but model.moe.num_experts is "
                f"{self.num_experts}; a token cannot use more experts than there are."
            )


@dataclasses.dataclass(frozen=True)
class JtokConfig:
    """Token tables of JTok (Eq. 7-9) and JTok-M (Eq. 10-13)."""

    kind: str = "none"  # none | jtok | jtok_m
    norm: str = "rms"  # open: l2 | rms; rms equals l2 with the scale times sqrt(D)
    eps: float = 1e-6  # open: added to the norm of a row
    gate_scale_init: float = 1.0  # open: s of JTok; with l2 and 1.0 the gate hardly moves
    mixture_scale_init: float = 0.1  # open: s of JTok-M; 0 starts as the backbone exactly
    table_init_std: float = 0.02  # open: standard deviation of a table entry
    table_dtype: str = "float32"  # open: float32 | bfloat16
    layers: str = "all"  # open: all | odd | even | indices such as "0,2,5"
    sharing: str = "per_layer"  # open: per_layer | shared (one set of tables for all layers)
    num_tables: int = 5  # n_e of JTok-M; JTok has one
    top_k: int = 2  # K of JTok-M
    router_input: str = "pre_attention"  # open: pre_attention | post_attention
    router_norm: str = "shared"  # open: shared (with attention or feed-forward) | own | weightless
    router_bias: bool = False  # open
    router_bias_init: float = 0.0  # open; only read with router_bias
    router_init_std: float = 0.02  # open
    balance_weight: float = 1e-4  # lambda, App. B; summed over layers
    balance_probability: str = "sigmoid"  # open: sigmoid | normalized (over the n_e tables)
    implementation: str = "auto"  # of the table operations: auto | xla | mosaic_gpu | mosaic_tpu

    def __post_init__(self):
        _one_of(self.kind, "model.jtok.kind", ("none", "jtok", "jtok_m"))
        _one_of(self.norm, "model.jtok.norm", ("l2", "rms"))
        _one_of(self.table_dtype, "model.jtok.table_dtype", ("float32", "bfloat16"))
        implementations = ("auto", "xla", "mosaic_gpu", "mosaic_tpu")
        _one_of(self.implementation, "model.jtok.implementation", implementations)
        _one_of(self.sharing, "model.jtok.sharing", ("per_layer", "shared"))
        _one_of(self.router_input, "model.jtok.router_input", ("pre_attention", "post_attention"))
        _one_of(self.router_norm, "model.jtok.router_norm", ("shared", "own", "weightless"))
        probability = self.balance_probability
        _one_of(probability, "model.jtok.balance_probability", ("sigmoid", "normalized"))
        _at_least(self, "model.jtok", 0, "eps", "table_init_std", "balance_weight")
        _at_least(self, "model.jtok", 1, "num_tables", "top_k")
        if self.top_k > self.num_tables:
            raise ConfigError(
                f"model.jtok.top_k (K) is {self.top_k} but model.jtok.num_tables (n_e) is "
                f"{self.num_tables}; K cannot exceed n_e."
            )

    @property
    def tables_per_layer(self) -> int:
        return self.num_tables if self.kind == "jtok_m" else 1

    @property
    def rows_per_token(self) -> int:
        return self.top_k if self.kind == "jtok_m" else 1

    def table_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the layers that carry tables, ascending."""
        if self.kind == "none":
            return ()
        named = {"all": range(num_layers), "even": range(0, num_layers, 2)}
        named["odd"] = range(1, num_layers, 2)
        if self.layers in named:
            if not named[self.layers]:
                raise ConfigError(
                    f"model.jtok.layers is {self.layers!r}: of {num_layers} layers none has tables."
                )
            return tuple(named[self.layers])
        try:
            indices = tuple(sorted({int(part) for part in self.layers.split(",")}))
        except ValueError as error:
            raise ConfigError(
                f"model.jtok.layers is {self.layers!r}; expected all, odd, even or layer "
                'indices such as "0,2,5".'
            ) from error
        if indices[0] < 0 or indices[-1] >= num_layers:
            raise ConfigError(
                f"model.jtok.layers is {self.layers!r} but the layers are 0 to {num_layers - 1}."
            )
        return indices

    def table_of_layer(self, num_layers: int) -> tuple[int, ...]:
        """For each layer the index of its table set in the stack, or -1 where it has none."""
        carrying = self.table_layers(num_layers)
        shared = self.sharing == "shared"
        return tuple(
            -1 if i not in carrying else 0 if shared else carrying.index(i)
            for i in range(num_layers)
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder: pre-norm, rotary, grouped-query attention, SwiGLU or experts, token tables."""

    vocab_size: int = 4096
    vocab_multiple: int = 1  # embedding, head and tables have rows to a multiple; others are inert
    model_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 0  # 0: model_dim / num_heads
    ffn_dim: int = 344  # width of the dense SwiGLU; not read where there are experts
    head: str = "untied"  # untied | tied to the input embedding
    qk_norm: str = "none"  # none | rms, per head before the rotation
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02  # every projection; output projections divide by sqrt(2 num_layers)
    embed_init_std: float = 0.0  # of the embedding; 0: init_std
    param_dtype: str = "float32"  # of embedding, head and matrices; bfloat16 is rounded at random
    compute_dtype: str = "bfloat16"  # norms, softmax, routers and loss stay in float32
    attention: str = "auto"  # auto (cudnn on a GPU that can, else xla) | xla | chunked | cudnn
    remat: str = "none"  # none | dots (keep matmul results) | full (keep layer inputs only)
    loss_chunk: int = 0  # tokens of a device whose logits exist at once; 0: all of a microbatch
    moe: MoeConfig = dataclasses.field(default_factory=MoeConfig)
    jtok: JtokConfig = dataclasses.field(default_factory=JtokConfig)
    arms: ArmsConfig = dataclasses.field(default_factory=ArmsConfig)  # compared with tables

    def __post_init__(self):
        _at_least(
            self, "model", 1, "vocab_size", "vocab_multiple", "model_dim", "num_layers",
            "num_heads", "num_kv_heads", "ffn_dim", "rope_base",
        )  # fmt: skip
        _at_least(self, "model", 0, "head_dim", "loss_chunk", "norm_eps")
        _at_least(self, "model", 0, "init_std", "embed_init_std")
        _one_of(self.head, "model.head", ("untied", "tied"))
        _one_of(self.qk_norm, "model.qk_norm", ("none", "rms"))
        _one_of(self.attention, "model.attention", ("auto", "xla", "chunked", "cudnn"))
        _one_of(self.remat, "model.remat", ("none", "dots", "full"))
        _one_of(self.param_dtype, "model.param_dtype", ("float32", "bfloat16"))
        _one_of(self.compute_dtype, "model.compute_dtype", ("float32", "bfloat16"))
        if not self.head_dim and self.model_dim % self.num_heads:
            raise ConfigError(
                f"model.model_dim ({self.model_dim}) is not a multiple of model.num_heads "
                f"({self.num_heads}); choose heads that divide the width or set model.head_dim."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads ({self.num_heads}) is not a multiple of model.num_kv_heads "
                f"({self.num_kv_heads}); every key-value head serves the same number of heads."
            )
        if self.head_size % 2:
            raise ConfigError(f"The head width is {self.head_size}; the rotation needs it even.")
        self.jtok.table_layers(self.num_layers)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def padded_vocab(self) -> int:
        """Rows of embedding and tables: ids, and zeros that no id names and nothing changes."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def tables_shape(self) -> tuple[int, ...] | None:
        """Stacked tables: JTok [G, V, D], JTok-M [G, M, V, D]; None without tables."""
        stack = max(self.jtok.table_of_layer(self.num_layers), default=-1) + 1
        if stack == 0:
            return None
        several = (self.jtok.num_tables,) if self.jtok.kind == "jtok_m" else ()
        return stack, *several, self.padded_vocab, self.model_dim


@dataclasses.dataclass(frozen=True)
class TableOptimizerConfig:
    """The optimizer of the token tables (jtok_kernels/row_optimizers.py). All open in the paper."""

    kind: str = "lazy_adam"  # adamw (dense) | lazy_adam | rowwise_adam | rowwise_adagrad
    learning_rate_multiplier: float = 10.0  # of optimizer.learning_rate
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    stochastic_rounding: bool = True  # of bfloat16 tables; False: to the nearest

    def __post_init__(self):
        kinds = ("adamw", "lazy_adam", "rowwise_adam", "rowwise_adagrad")
        _one_of(self.kind, "optimizer.tables.kind", kinds)
        _at_least(self, "optimizer.tables", 0, "learning_rate_multiplier", "weight_decay")
        _check_betas(self, "optimizer.tables")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the backbone; decay acts on matrices, never on norms, scales or biases."""

    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # global norm over backbone and tables; 0: no clipping
    tables: TableOptimizerConfig = dataclasses.field(default_factory=TableOptimizerConfig)

    def __post_init__(self):
        _at_least(self, "optimizer", 0, "learning_rate", "weight_decay", "clip_norm")
        _check_betas(self, "optimizer")
        if not self.eps > 0:
            raise ConfigError(
                f"optimizer.eps is {self.eps}; expected more than 0: an entry whose gradient was "
                "always zero would become 0 / 0."
            )
        rate = self.learning_rate * self.tables.learning_rate_multiplier
        if rate * self.tables.weight_decay >= 1:
            raise ConfigError(
                f"optimizer.tables.weight_decay is {self.tables.weight_decay} at a learning rate "
                f"of {rate}; their product must be less than 1, the share of a row that is lost."
            )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps, as a fraction of optimizer.learning_rate."""

    kind: str = "cosine"  # cosine | wsd (warm up, stay, decay linearly) | constant
    steps: int = 0  # length of the schedule; 0: train.steps
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2  # wsd only; the published runs used 0
    final_fraction: float = 0.1  # where cosine and wsd end

    def __post_init__(self):
        _one_of(self.kind, "schedule.kind", ("cosine", "wsd", "constant"))
        _at_least(
            self, "schedule", 0, "steps", "warmup_fraction", "decay_fraction", "final_fraction"
        )
        used = self.warmup_fraction + self.decay_fraction * (self.kind == "wsd")
        if used > 1:
            raise ConfigError(
                f"schedule.warmup_fraction and decay_fraction add up to {used}; at most 1 is left."
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and guards of the run."""

    steps: int = 1000
    batch_size: int = 8  # sequences per step
    seq_len: int = 256
    seed: int = 0  # initial values and data order
    grad_accumulation: int = 1  # microbatches per step
    max_unique_ids: int = 0  # of a step; fewer take less memory and time; 0: as many as tokens
    z_loss: float = 1e-4  # weight of mean(logsumexp(logits)^2)
    max_bad_steps: int = 5  # non-finite steps in a row that stop the run
    stall_seconds: float = 1800.0  # longest wait for a batch, step or save; 0: no limit
    start_seconds: float = 300.0  # longest wait for all processes to come, and to compare notes
    heartbeat_seconds: int = 100  # a process silent for so long is taken for dead
    log_every: int = 10  # steps between console lines; metrics.jsonl has every step

    def __post_init__(self):
        _at_least(
            self, "train", 1, "steps", "batch_size", "seq_len", "grad_accumulation",
            "max_bad_steps", "log_every",
        )  # fmt: skip
        _at_least(self, "train", 0, "seed", "z_loss", "stall_seconds", "max_unique_ids")
        _at_least(self, "train", 1, "start_seconds", "heartbeat_seconds")
        if self.seed >= 1 << 32:
            raise ConfigError(f"train.seed is {self.seed}; expected less than 2^32.")
        if self.batch_size % self.grad_accumulation:
            raise ConfigError(
                f"train.batch_size ({self.batch_size}) is not a multiple of "
                f"train.grad_accumulation ({self.grad_accumulation})."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints kept

    def __post_init__(self):
        _at_least(self, "checkpoint", 1, "every", "keep")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every: int = 500  # steps between evaluations; also before step 1 and at the end
    batch_size: int = 16  # sequences per forward pass
    max_sequences: int = 0  # as many, evenly spaced in the held-out set; 0: all of it

    def __post_init__(self):
        _at_least(self, "evaluation", 1, "every", "batch_size")
        _at_least(self, "evaluation", 0, "max_sequences")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "prepared"  # prepared (by jtok_jax.prepare) | synthetic (random ids)
    path: str = ""  # folder written by jtok_jax.prepare
    read_threads: int = 2
    prefetch: int = 8  # batches read ahead
    verify: str = "size"  # of every shard, at start | hash: and its SHA-256; reading checks anyway

    def __post_init__(self):
        _one_of(self.source, "data.source", ("prepared", "synthetic"))
        _one_of(self.verify, "data.verify", ("hash", "size"))
        _at_least(self, "data", 1, "read_threads", "prefetch")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis. All but `tensor` split the batch; more in docs/architecture.md."""

    data: int = -1  # -1: all devices that are left
    fsdp: int = 1  # splits D of parameters
    expert: int = 1  # splits the experts of a mixture
    tensor: int = 1  # splits heads, the feed-forward's width and the vocabulary
    # Axes that split the tables that way, as "fsdp,tensor"; auto: that leave 128 n columns each.
    table_columns: str = "auto"
    table_experts: str = ""  # the n_e tables of JTok-M
    table_rows: str = ""

    def __post_init__(self):
        _at_least(self, "mesh", 1, "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    tensorboard: bool = False  # also write DIR/tensorboard (needs tensorboardX)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    @property
    def schedule_steps(self) -> int:
        return self.schedule.steps or self.train.steps

    @property
    def rows_per_step(self) -> int:
        """U: rows of a table that a step has gradients for, one for each different id."""
        tokens = self.train.batch_size * self.train.seq_len
        return min(tokens, self.model.vocab_size, self.train.max_unique_ids or tokens)


def base_config() -> ml_collections.ConfigDict:
    """Every field at its default, for a file in configs/ to change a few of."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))
