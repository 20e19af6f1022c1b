# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Every option of a run: frozen dataclasses, their defaults and their checks.

Those of the model are in `model_config.py`. A file in configs/ changes fields of `base_config()`;
`config_dict.py` reads the result. Fields that the paper (arXiv 2602.00800) leaves open are marked
"open".
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import ml_collections

from jtok_jax.checks import at_least, check_betas, names, one_of, parse_options
from jtok_jax.errors import ConfigError
from jtok_jax.model_config import ModelConfig


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


@dataclasses.dataclass(frozen=True)
class TableOptimizerConfig:
    """The optimizer of the token tables (jtok_kernels/row_optimizers.py). All open in the paper."""

    kind: str = "lazy_adam"  # adamw (dense) | lazy_adam | rowwise_adam | rowwise_adagrad
    learning_rate_multiplier: float = 10.0  # of optimizer.learning_rate
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    stochastic_rounding: bool = True  # of bfloat16 tables; False: to the nearest
    # Other values for the tables of one layer: "jtok.kind=adamw, ngram.weight_decay=0.1".
    overrides: str = ""

    def __post_init__(self):
        kinds = ("adamw", "lazy_adam", "rowwise_adam", "rowwise_adagrad")
        one_of(self.kind, "optimizer.tables.kind", kinds)
        at_least(self, "optimizer.tables", 0, "learning_rate_multiplier", "weight_decay")
        check_betas(self, "optimizer.tables")
        for owner in self.owners:
            self.of(owner)

    @property
    def owners(self) -> tuple[str, ...]:
        """Return the layers whose tables have values of their own."""
        return tuple(dict.fromkeys(owner for owner, _, _ in self._overrides()))

    def of(self, owner: str) -> "TableOptimizerConfig":
        """Return the options for the tables of a layer: "jtok" or the name of an arm."""
        own = {field: value for name, field, value in self._overrides() if name == owner}
        return dataclasses.replace(self, overrides="", **own)

    def _overrides(self) -> Iterator[tuple[str, str, object]]:
        fields = {field.name: field.type for field in dataclasses.fields(self)}
        read = {float: _finite, str: str, bool: {"true": True, "false": False}.__getitem__}
        seen = set()
        for part in names(self.overrides):
            target, _, text = part.partition("=")
            owner, _, field = target.strip().rpartition(".")
            try:
                if not owner or field == "overrides" or (owner, field) in seen:
                    raise KeyError(field)
                seen.add((owner, field))
                yield owner, field, read[fields[field]](text.strip())
            except (KeyError, ValueError):
                raise ConfigError(
                    f"optimizer.tables.overrides has {part!r}; expected LAYER.FIELD=VALUE, each "
                    "once, with a field of optimizer.tables, such as ngram.weight_decay=0.1 or "
                    "jtok.stochastic_rounding=false."
                ) from None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the backbone; decay acts on matrices, never on norms, scales or biases."""

    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # global norm over all that is trained; 0: no clipping
    frozen: str = "none"  # none | backbone: tables, and what JTok and arms have beside, train alone
    tables: TableOptimizerConfig = dataclasses.field(default_factory=TableOptimizerConfig)

    def __post_init__(self):
        at_least(self, "optimizer", 0, "learning_rate", "weight_decay", "clip_norm")
        check_betas(self, "optimizer")
        one_of(self.frozen, "optimizer.frozen", ("none", "backbone"))
        if not self.eps > 0:
            raise ConfigError(
                f"optimizer.eps is {self.eps}; expected more than 0: an entry whose gradient was "
                "always zero would become 0 / 0."
            )
        for tables in (self.tables, *map(self.tables.of, self.tables.owners)):
            rate = self.learning_rate * tables.learning_rate_multiplier
            if rate * tables.weight_decay >= 1:
                raise ConfigError(
                    f"optimizer.tables.weight_decay is {tables.weight_decay} at a learning rate "
                    f"of {rate}; their product must be less than 1, the share of a row that is "
                    "lost."
                )


SCHEDULES = ("cosine", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps, as a fraction of optimizer.learning_rate."""

    kind: str = "cosine"  # cosine | wsd (warm up, stay, decay linearly) | constant
    steps: int = 0  # length of the schedule; 0: train.steps
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2  # wsd only; the published runs used 0
    final_fraction: float = 0.1  # of the rate, which cosine and wsd reach after the last step

    def __post_init__(self):
        one_of(self.kind, "schedule.kind", SCHEDULES)
        at_least(
            self, "schedule", 0, "steps", "warmup_fraction", "decay_fraction", "final_fraction"
        )
        used = self.warmup_fraction + self.decay_fraction * (self.kind == "wsd")
        if used > 1:
            raise ConfigError(
                f"schedule.warmup_fraction and decay_fraction add up to {used}; at most 1 is left."
            )


# What a run may change on resume, where train.allow_changes names it: its state stays what it is.
CHANGEABLE = (
    "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_norm",
    "optimizer.tables.learning_rate_multiplier", "schedule.kind", "schedule.steps",
    "schedule.warmup_fraction", "schedule.decay_fraction", "schedule.final_fraction",
    "train.batch_size", "train.grad_accumulation", "train.z_loss",
)  # fmt: skip


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
    stall_seconds: float = 1800.0  # longest wait: batch, compilation, step, save; 0: no limit
    start_seconds: float = 300.0  # longest wait for all processes to come, and to compare notes
    heartbeat_seconds: int = 100  # a process silent for so long is taken for dead
    log_every: int = 10  # steps between console lines; metrics.jsonl has every step
    # Fields that may differ from the run's on resume, as "optimizer.learning_rate,schedule".
    allow_changes: str = ""
    # Of the training step's compiler, as "--name=value --name=value"; see docs/plan.md.
    compiler_options: str = ""

    def __post_init__(self):
        at_least(
            self, "train", 1, "steps", "batch_size", "seq_len", "grad_accumulation",
            "max_bad_steps", "log_every",
        )  # fmt: skip
        at_least(self, "train", 0, "seed", "z_loss", "stall_seconds", "max_unique_ids")
        at_least(self, "train", 1, "start_seconds", "heartbeat_seconds")
        if self.seed >= 1 << 32:
            raise ConfigError(f"train.seed is {self.seed}; expected less than 2^32.")
        if self.batch_size % self.grad_accumulation:
            raise ConfigError(
                f"train.batch_size ({self.batch_size}) is not a multiple of "
                f"train.grad_accumulation ({self.grad_accumulation})."
            )
        parse_options(self.compiler_options, "train.compiler_options")
        for name in names(self.allow_changes):
            if not any(one == name or one.startswith(f"{name}.") for one in CHANGEABLE):
                raise ConfigError(
                    f"train.allow_changes names {name!r}; a run can change {', '.join(CHANGEABLE)}."
                )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written, and which are kept."""

    every: int = 500  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints kept
    keep_best: int = 0  # also those of the lowest validation loss, of steps that have one
    keep_every: int = 0  # also those of steps that it divides; 0: none

    def __post_init__(self):
        at_least(self, "checkpoint", 1, "every", "keep")
        at_least(self, "checkpoint", 0, "keep_best", "keep_every")
        if self.keep_every % self.every:
            raise ConfigError(
                f"checkpoint.keep_every is {self.keep_every}; expected a multiple of "
                f"checkpoint.every, {self.every}: others are never saved."
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When the held-out set is evaluated, and how much of it."""

    every: int = 500  # steps between evaluations; also before step 1 and at the end
    batch_size: int = 16  # sequences per forward pass
    max_sequences: int = 0  # as many, evenly spaced in the held-out set; 0: all of it

    def __post_init__(self):
        at_least(self, "evaluation", 1, "every", "batch_size")
        at_least(self, "evaluation", 0, "max_sequences")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Says where batches come from."""

    source: str = "prepared"  # prepared (by jtok_jax.prepare) | synthetic (random ids)
    path: str = ""  # folder written by jtok_jax.prepare; several by weight: A:0.7,B:0.3
    ngrams: str = ""  # file of jtok_jax.scone build, for a stream of frequent n-grams
    read_threads: int = 2
    prefetch: int = 8  # batches read ahead
    verify: str = "size"  # of every shard, at start | hash: and its SHA-256; reading checks anyway

    def __post_init__(self):
        one_of(self.source, "data.source", ("prepared", "synthetic"))
        one_of(self.verify, "data.verify", ("hash", "size"))
        at_least(self, "data", 1, "read_threads", "prefetch")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis. All but `tensor` split the batch; more in docs/architecture.md."""

    data: int = -1  # -1: all devices that are left
    fsdp: int = 1  # splits D of parameters
    expert: int = 1  # splits the experts of a mixture
    tensor: int = 1  # splits heads, the feed-forward's width and the vocabulary
    # Axes that split the tables that way, as "fsdp,tensor"; auto: that leave 128 n columns each;
    # fit: that leave any number, table by table.
    table_columns: str = "auto"
    table_experts: str = ""  # the n_e tables of JTok-M
    table_rows: str = ""
    # device | host: tables and what their optimizer keeps of rows lie in host memory, and the
    # rows of a step on the device.
    table_memory: str = "device"
    table_prefetch: int = 1  # steps whose rows are read ahead, of tables in host memory
    # Of tables in host memory: also the rows of a step stay there; layers move theirs in turn.
    table_streaming: bool = False
    # Of tables in host memory: a folder on a local disk, whose files hold them; "": memory does.
    table_folder: str = ""
    table_dtype: str = ""  # int8: of host tables that are only read; "": as they were trained

    def __post_init__(self):
        at_least(self, "mesh", 1, "fsdp", "expert", "tensor")
        at_least(self, "mesh", 0, "table_prefetch")
        one_of(self.table_memory, "mesh.table_memory", ("device", "host"))
        one_of(self.table_dtype, "mesh.table_dtype", ("", "int8"))
        for name in ("table_folder", "table_dtype", "table_streaming"):
            if self.table_memory == "device" and getattr(self, name):
                raise ConfigError(
                    f"mesh.{name} is {getattr(self, name)!r}, and tables are on devices; it is for "
                    "mesh.table_memory=host."
                )
        if self.table_streaming and self.table_prefetch:
            raise ConfigError(
                f"mesh.table_prefetch is {self.table_prefetch}, and mesh.table_streaming is on: "
                "rows that are streamed are not read ahead. Set mesh.table_prefetch=0."
            )
        if self.table_memory == "host" and names(self.table_rows):
            raise ConfigError(
                f"mesh.table_rows is {self.table_rows!r}, and tables are in host memory: of their "
                "rows only those of a step are on devices. Split columns, or tables of a layer."
            )

    def tables_in(
        self, memory: str | None, folder: str = "", dtype: str = "", run: "MeshConfig | None" = None
    ) -> "MeshConfig":
        """Return this mesh with tables elsewhere; rows in host memory are not split.

        Args:
            memory: "device" or "host"; None: "host" with a folder or a dtype, or as in the run.
            folder, dtype: those of `table_folder` and `table_dtype`; "": none, or in host memory
                the run's dtype.
            run: where its tables lay; None: on devices.
        """
        run = run or MeshConfig()
        memory = memory or ("host" if folder or dtype else run.table_memory)
        dtype = dtype or (run.table_dtype if memory == "host" else "")
        rows = "" if memory == "host" else self.table_rows
        return dataclasses.replace(
            self, table_memory=memory, table_rows=rows, table_folder=folder, table_dtype=dtype,
            table_streaming=False,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Writers of metrics beside metrics.jsonl; each field turns one on."""

    tensorboard: bool = False  # also write DIR/tensorboard (needs tensorboardX)
    wandb: str = ""  # also write to this project of W&B (needs wandb)


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, for TensorBoard or Perfetto."""

    steps: str = ""  # such as 10:15, the first and the last; written to DIR/profile

    def __post_init__(self):
        if self.steps and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.steps):
            raise ConfigError(f"profile.steps is {self.steps!r}; expected FIRST:LAST as 10:15.")

    @property
    def window(self) -> tuple[int, int] | None:
        """Return the first and the last step that are traced."""
        first, _, last = self.steps.partition(":")
        return (int(first), int(last)) if self.steps else None


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
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    # Parameters to begin with: those of a run, RUN or RUN@STEP, or a folder of Hugging Face.
    init_from: str = ""
    init_moments: bool = False  # of its optimizer too; the step and the schedule begin at 0

    def __post_init__(self):
        unknown = set(self.optimizer.tables.owners) - set(self.model.table_owners)
        if unknown:
            raise ConfigError(
                f"optimizer.tables.overrides names {', '.join(sorted(unknown))}, which has no "
                f"tables here; there are those of {', '.join(self.model.table_owners) or 'none'}. "
                "model.jtok.kind and model.arms.names turn layers on."
            )
        if self.optimizer.frozen == "backbone" and not self.model.owners:
            raise ConfigError(
                "optimizer.frozen is backbone, and there is nothing else to train. Set "
                "model.jtok.kind or model.arms.names."
            )
        if self.init_moments and not self.init_from:
            raise ConfigError("init_moments is on, and init_from names no run to take them of.")
        if self.mesh.table_streaming and self.model.remat == "none":
            raise ConfigError(
                "mesh.table_streaming is on, and model.remat is none, which keeps the rows of all "
                "layers on the device. Set model.remat=dots or full."
            )
        save, validate = self.checkpoint.every, self.evaluation.every
        if self.checkpoint.keep_best and save % validate and validate % save:
            raise ConfigError(
                f"checkpoint.keep_best ranks steps that are saved and validated; checkpoint.every "
                f"is {save}, evaluation.every {validate}. Make one a multiple of the other."
            )

    @property
    def schedule_steps(self) -> int:
        return self.schedule.steps or self.train.steps

    def unique_rows(self, stream: str) -> int:
        """Return U, the rows of a table that a step has gradients for: one a different id.

        train.max_unique_ids is of tokens; of n-grams there is always room for all.
        """
        tokens = self.train.batch_size * self.train.seq_len
        if stream == "token":
            return min(tokens, self.model.vocab_size, self.train.max_unique_ids or tokens)
        found = self.model.id_streams[stream]
        return min(tokens * found.heads + found.frequent, found.num_rows)


def base_config() -> ml_collections.ConfigDict:
    """Return every field at its default, for a file in configs/ to change a few of."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))
