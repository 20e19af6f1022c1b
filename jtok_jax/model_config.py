# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Every option of a model: frozen dataclasses, their defaults and their checks.

Fields that the paper (arXiv 2602.00800) leaves open are marked "open".
"""

import dataclasses

from jtok_jax.arms_config import NORMS, ArmsConfig
from jtok_jax.checks import at_least, one_of
from jtok_jax.errors import ConfigError
from jtok_jax.rope import parse_rope_scaling
from jtok_jax.streams import IdStream, parse_streams

ROUTER_NORMS = ("shared", "own", "weightless")
PROBABILITIES = ("sigmoid", "normalized")  # of tables, in the balance loss
DTYPES = ("float32", "bfloat16")


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
        at_least(self, "model.moe", 0, "num_experts", "shared_dim", "balance_weight")
        if self.num_experts == 0:
            return
        at_least(self, "model.moe", 1, "top_k", "expert_dim")
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
    stream: str = "token"  # what a row is looked up by: token, or one of model.streams
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
        one_of(self.kind, "model.jtok.kind", ("none", "jtok", "jtok_m"))
        one_of(self.norm, "model.jtok.norm", NORMS)
        one_of(self.table_dtype, "model.jtok.table_dtype", DTYPES)
        implementations = ("auto", "xla", "mosaic_gpu", "mosaic_tpu")
        one_of(self.implementation, "model.jtok.implementation", implementations)
        one_of(self.sharing, "model.jtok.sharing", ("per_layer", "shared"))
        one_of(self.router_input, "model.jtok.router_input", ("pre_attention", "post_attention"))
        one_of(self.router_norm, "model.jtok.router_norm", ROUTER_NORMS)
        probability = self.balance_probability
        one_of(probability, "model.jtok.balance_probability", PROBABILITIES)
        at_least(self, "model.jtok", 0, "eps", "table_init_std", "balance_weight")
        at_least(self, "model.jtok", 1, "num_tables", "top_k")
        if self.top_k > self.num_tables:
            raise ConfigError(
                f"model.jtok.top_k (K) is {self.top_k} but model.jtok.num_tables (n_e) is "
                f"{self.num_tables}; K cannot exceed n_e."
            )

    @property
    def rows_per_token(self) -> int:
        return self.top_k if self.kind == "jtok_m" else 1

    def table_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return indices of the layers that carry tables, ascending."""
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
        """Return for each layer the index of its tables in the stack, or -1 without them."""
        carrying = self.table_layers(num_layers)
        shared = self.sharing == "shared"
        return tuple(
            -1 if i not in carrying else 0 if shared else carrying.index(i)
            for i in range(num_layers)
        )


@dataclasses.dataclass(frozen=True)
class PattentionConfig:
    """Pattention of TokenFormer (arXiv 2410.23168) in place of the linear maps of a block."""

    kind: str = "none"  # none | ffn (the feed-forward) | all (queries, keys, values, out too)
    slots: int = 128  # n of each map of attention; only read with all
    ffn_slots: int = 512  # n of the feed-forward
    # Slots before each growth, as 576 or 576,1024: the factor sqrt(n) stays that of the first.
    grown_from: str = ""
    ffn_grown_from: str = ""
    form: str = "safe"  # of norm and GELU: safe | torch | tpu (the published codes)
    init: str = "torch"  # torch (keys init_std, values 2 / (L sqrt(D))) | fan_in

    def __post_init__(self):
        where = "model.pattention"
        one_of(self.kind, f"{where}.kind", ("none", "ffn", "all"))
        one_of(self.form, f"{where}.form", ("safe", "torch", "tpu"))
        one_of(self.init, f"{where}.init", ("torch", "fan_in"))
        at_least(self, where, 1, "slots", "ffn_slots")
        for name, slots in (("", self.slots), ("ffn_", self.ffn_slots)):
            before = getattr(self, f"{name}slots_before")
            if list(before) != sorted({*before}) or not all(0 < n < slots for n in before):
                raise ConfigError(
                    f"{where}.{name}grown_from is {getattr(self, f'{name}grown_from')!r}; expected "
                    f"numbers of slots that rise, below {where}.{name}slots = {slots}."
                )

    @property
    def slots_before(self) -> tuple[int, ...]:
        """Return the slots of each map of attention before every growth."""
        return _integers("model.pattention.grown_from", self.grown_from)

    @property
    def ffn_slots_before(self) -> tuple[int, ...]:
        """Return the slots of the feed-forward before every growth."""
        return _integers("model.pattention.ffn_grown_from", self.ffn_grown_from)


def _integers(name: str, text: str) -> tuple[int, ...]:
    """Return numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}; expected numbers such as 576,1024.") from error


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder: pre-norm, rotary, grouped-query attention, a feed-forward, token tables."""

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
    attention_bias: str = "none"  # none | qkv (as Qwen2) | qkvo
    rope_base: float = 10000.0
    rope_scaling: str = ""  # linear:FACTOR | llama3:FACTOR:LOW:HIGH:LENGTH, see jtok_jax/rope.py
    rope_fraction: float = 1.0  # share of a head that is rotated, its first entries
    block_norm: str = "rms"  # of blocks: rms | weightless_rms | weightless_layer (as TokenFormer)
    norm_eps: float = 1e-6
    init_std: float = 0.02  # every projection; output projections divide by sqrt(2 num_layers)
    embed_init_std: float = 0.0  # of the embedding; 0: init_std
    param_dtype: str = "float32"  # of embedding, head and matrices; bfloat16 is rounded at random
    compute_dtype: str = "bfloat16"  # norms, softmax, routers and loss stay in float32
    # auto | xla | chunked | cudnn (GPUs) | splash (TPUs); auto: that of the device, or xla
    attention: str = "auto"
    remat: str = "none"  # none | dots (keep matmul results) | full (keep layer inputs only)
    loss_chunk: int = 0  # tokens of a device whose logits exist at once; 0: all of a microbatch
    moe: MoeConfig = dataclasses.field(default_factory=MoeConfig)
    pattention: PattentionConfig = dataclasses.field(default_factory=PattentionConfig)
    jtok: JtokConfig = dataclasses.field(default_factory=JtokConfig)
    arms: ArmsConfig = dataclasses.field(default_factory=ArmsConfig)  # other layers
    # The token that begins a document: attention, positions and n-grams begin anew at it. -1: a
    # window is one text, whatever it holds.
    document_id: int = -1
    streams: str = ""  # hashed n-grams that tables are looked up by, see jtok_jax/streams.py

    def __post_init__(self):
        at_least(
            self, "model", 1, "vocab_size", "vocab_multiple", "model_dim", "num_layers",
            "num_heads", "num_kv_heads", "ffn_dim", "rope_base",
        )  # fmt: skip
        at_least(self, "model", 0, "head_dim", "loss_chunk", "norm_eps")
        at_least(self, "model", 0, "init_std", "embed_init_std")
        at_least(self, "model", -1, "document_id")
        one_of(self.head, "model.head", ("untied", "tied"))
        one_of(self.qk_norm, "model.qk_norm", ("none", "rms"))
        one_of(self.block_norm, "model.block_norm", ("rms", "weightless_rms", "weightless_layer"))
        one_of(self.attention_bias, "model.attention_bias", ("none", "qkv", "qkvo"))
        parse_rope_scaling(self.rope_scaling)
        kinds = ("auto", "xla", "chunked", "cudnn", "splash")
        one_of(self.attention, "model.attention", kinds)
        one_of(self.remat, "model.remat", ("none", "dots", "full"))
        one_of(self.param_dtype, "model.param_dtype", DTYPES)
        one_of(self.compute_dtype, "model.compute_dtype", DTYPES)
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
        if not 0 < self.rope_fraction <= 1 or self.rotated_size % 2 or not self.rotated_size:
            raise ConfigError(
                f"model.rope_fraction is {self.rope_fraction}, {self.rotated_size} of the "
                f"{self.head_size} entries of a head; expected above 0, at most 1, and an even "
                "number of entries."
            )
        if self.pattention.kind != "none" and self.moe.num_experts:
            raise ConfigError(
                "model.pattention and model.moe both replace the feed-forward. Set "
                "model.pattention.kind=none or model.moe.num_experts=0."
            )
        self.jtok.table_layers(self.num_layers)
        self._check_streams()
        if self.arms.makes_ngrams:
            try:
                _ = self.ngram_model
            except ConfigError as error:
                raise ConfigError(f"Of A_f, by model.arms.scone: {error}") from error

    def _check_streams(self) -> None:
        streams, read = self.id_streams, self.streams_read
        for where, names in read.items():
            for name in names:
                if name not in streams:
                    form = "5:ROWS:frequent" if where == "model.arms.scone.stream" else "2:65536"
                    raise ConfigError(
                        f"{where} names {name!r}, but the id streams are "
                        f"{', '.join(streams)}. Declare it: model.streams={name}={form}"
                    )
        if self.jtok.kind != "none" and streams[self.jtok.stream].heads > 1:
            raise ConfigError(
                f"model.jtok.stream is {self.jtok.stream!r}, which has several hash heads; JTok "
                "reads one row of a table. Leave out the heads."
            )
        if len(self.frequent_streams) > 1:
            raise ConfigError(
                f"model.streams declares {' and '.join(self.frequent_streams)} as frequent n-grams;"
                " there is one file of them, data.ngrams, so declare one."
            )
        scone = self.arms.scone
        if "scone" in self.arms.chosen() and not streams[scone.stream].frequent:
            raise ConfigError(
                f"model.arms.scone.stream is {scone.stream!r}, which is no stream of frequent "
                "n-grams. Declare one, and name it there: model.streams=frequent=5:ROWS:frequent"
            )
        unread = set(streams) - {"token"}.union(*read.values())
        if unread:
            raise ConfigError(
                f"model.streams declares {', '.join(sorted(unread))}, which no table reads; name "
                "it in model.jtok.stream or in an arm's options, or leave it out."
            )

    @property
    def id_streams(self) -> dict[str, IdStream]:
        """Return every id stream by name, read or not."""
        return parse_streams(self.streams, self.padded_vocab, self.document_id)

    @property
    def streams_read(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the streams that are read, by the option that says so."""
        arms = {
            f"model.arms.{arm}.{'streams' if arm == 'ngram' else 'stream'}": names
            for arm, names in self.arms.streams_read.items()
        }
        jtok = {} if self.jtok.kind == "none" else {"model.jtok.stream": (self.jtok.stream,)}
        return jtok | arms

    @property
    def owners(self) -> tuple[str, ...]:
        """Return the layers beside the backbone: "jtok" and names of arms."""
        return ("jtok",) * (self.jtok.kind != "none") + tuple(self.arms.chosen())

    @property
    def table_owners(self) -> tuple[str, ...]:
        """Return the layers that have tables: "jtok" and names of arms."""
        return ("jtok",) * (self.jtok.kind != "none") + tuple(self.arms.table_streams)

    @property
    def context(self) -> int:
        """Return how many ids before a token its rows depend on."""
        streams = self.id_streams
        return max(
            (streams[n].order - 1 for ns in self.streams_read.values() for n in ns), default=0
        )

    @property
    def frequent_streams(self) -> dict[str, IdStream]:
        """Return the streams of frequent n-grams by name: all are read."""
        return {name: one for name, one in self.id_streams.items() if one.frequent}

    @property
    def ngram_model(self) -> "ModelConfig":
        """Return the options of A_f's blocks: the model's, but for what arms.scone says."""
        options, changes = self.arms.scone, {}
        if options.model_dim:
            changes |= {"model_dim": options.model_dim, "head_dim": 0}
        if options.num_heads:
            changes |= {"num_heads": options.num_heads, "num_kv_heads": options.num_heads}
        return dataclasses.replace(
            self, **changes,
            num_layers=options.num_layers or self.num_layers,
            ffn_dim=options.ffn_dim or self.ffn_dim,
            jtok=JtokConfig(), moe=MoeConfig(), pattention=PattentionConfig(), arms=ArmsConfig(),
            streams="", document_id=-1, rope_scaling="",
        )  # fmt: skip

    @property
    def embed_std(self) -> float:
        """Return the standard deviation of the embedding at first."""
        return self.embed_init_std or self.init_std

    @property
    def head_size(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def rotated_size(self) -> int:
        """Return how many entries of a head are rotated."""
        return int(self.head_size * self.rope_fraction)

    @property
    def padded_vocab(self) -> int:
        """Return the rows of embedding and tables: those of ids, and zeros that nothing changes."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def tables_shape(self) -> tuple[int, ...] | None:
        """Return the shape of JTok's tables, [G, V, D] or [G, M, V, D]; None without them."""
        stack = max(self.jtok.table_of_layer(self.num_layers), default=-1) + 1
        if stack == 0:
            return None
        several = (self.jtok.num_tables,) if self.jtok.kind == "jtok_m" else ()
        return stack, *several, self.id_streams[self.jtok.stream].num_rows, self.model_dim
