# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Options of the layers that JTok is compared with and goes together with; all is plain data.

`jtok_jax/model/arms.py` has the layers. A table reads the id stream that `stream` names: "token",
or one that `model.streams` declares.
"""

import dataclasses

from jtok_jax.checks import at_least, names, one_of
from jtok_jax.errors import ConfigError

NORMS = ("l2", "rms")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A parallel adapter: dm + gelu(x down) up."""

    width: int = 64
    init_std: float = 0.02

    def __post_init__(self):
        at_least(self, "model.arms.adapter", 1, "width")
        at_least(self, "model.arms.adapter", 0, "init_std")


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """Tables by n-gram at the input: embed[x] + the rows of all streams; they start at zero."""

    streams: str = "bigram"  # of model.streams, with commas; a table for each

    def __post_init__(self):
        if not self.table_streams or len(set(self.table_streams)) < len(self.table_streams):
            raise ConfigError(
                f"model.arms.ngram.streams is {self.streams!r}; expected names of id streams, each "
                "once, with commas between them."
            )

    @property
    def table_streams(self) -> tuple[str, ...]:
        return names(self.streams)


@dataclasses.dataclass(frozen=True)
class _OneTable:
    """Options of a layer with one table."""

    stream: str = "token"

    @property
    def table_streams(self) -> tuple[str, ...]:
        return (self.stream,)


@dataclasses.dataclass(frozen=True)
class DeepEmbedConfig(_OneTable):
    """DeepEmbed (RWKV-8, 2025): dm (1 + E[x]), E zero at first."""


@dataclasses.dataclass(frozen=True)
class FilmConfig:
    """FiLM (arXiv 1709.07871): dm (1 + c A) + c B with c = x W, through `rank` entries."""

    rank: int = 32
    init_std: float = 0.02

    def __post_init__(self):
        at_least(self, "model.arms.film", 1, "rank")
        at_least(self, "model.arms.film", 0, "init_std")


@dataclasses.dataclass(frozen=True)
class LowRankConfig(_OneTable):
    """JTok with the row E[x] = A[x] B of low rank."""

    rank: int = 16
    norm: str = "rms"  # l2 | rms
    eps: float = 1e-6
    scale_init: float = 1.0
    init_std: float = 0.02

    def __post_init__(self):
        at_least(self, "model.arms.low_rank", 1, "rank")
        at_least(self, "model.arms.low_rank", 0, "init_std", "eps")
        one_of(self.norm, "model.arms.low_rank.norm", NORMS)


@dataclasses.dataclass(frozen=True)
class SconeConfig:
    """SCONE (arXiv 2502.01637): input embeddings of frequent n-grams in place of the token's."""

    stream: str = "frequent"  # of model.streams, declared as frequent
    kind: str = "model"  # model (a Transformer A_f makes them) | table (its rows, or trained ones)
    num_layers: int = 0  # of A_f; 0: as the model, here and in the next three
    model_dim: int = 0
    num_heads: int = 0
    ffn_dim: int = 0
    # Room for the prefixes of n-grams that a step has, each once, for each token of a device.
    room: float = 2.0
    output_init: float = 0.0  # open: root mean square of what A_f makes; 0: that of the embedding
    zero_init: bool = False  # open: what blocks of A_f add is zero at first, so it begins as a norm

    def __post_init__(self):
        where = "model.arms.scone"
        one_of(self.kind, f"{where}.kind", ("model", "table"))
        at_least(self, where, 0, "num_layers", "model_dim", "num_heads", "ffn_dim", "output_init")
        if not self.room > 0:
            raise ConfigError(f"{where}.room is {self.room}; expected more than 0 nodes a token.")

    @property
    def table_streams(self) -> tuple[str, ...]:
        return (self.stream,) if self.kind == "table" else ()


@dataclasses.dataclass(frozen=True)
class ValueEmbeddingConfig(_OneTable):
    """Value embeddings (after arXiv 2410.17897): v + E[x] in the attention of every layer."""

    init_std: float = 0.02

    def __post_init__(self):
        at_least(self, "model.arms.value_embedding", 0, "init_std")


@dataclasses.dataclass(frozen=True)
class ArmsConfig:
    """Which arms are on, and the options of all."""

    names: str = ""  # of the fields below, "ngram,film"; empty: none
    table_dtype: str = "float32"  # of their tables: float32 | bfloat16
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    deep_embed: DeepEmbedConfig = dataclasses.field(default_factory=DeepEmbedConfig)
    film: FilmConfig = dataclasses.field(default_factory=FilmConfig)
    low_rank: LowRankConfig = dataclasses.field(default_factory=LowRankConfig)
    ngram: NgramConfig = dataclasses.field(default_factory=NgramConfig)
    scone: SconeConfig = dataclasses.field(default_factory=SconeConfig)
    value_embedding: ValueEmbeddingConfig = dataclasses.field(default_factory=ValueEmbeddingConfig)

    def __post_init__(self):
        one_of(self.table_dtype, "model.arms.table_dtype", ("float32", "bfloat16"))
        known = [field.name for field in dataclasses.fields(self)][2:]
        chosen = names(self.names)
        for name in chosen:
            if name not in known or chosen.count(name) > 1:
                raise ConfigError(
                    f"model.arms.names is {self.names!r}; expected names, each once, of "
                    f"{', '.join(known)}, with commas between them."
                )

    def chosen(self) -> dict[str, object]:
        """Return the options of the arms that are on by name, in order."""
        return {name: getattr(self, name) for name in names(self.names)}

    @property
    def table_streams(self) -> dict[str, tuple[str, ...]]:
        """Return the id streams that tables of the arms read, by arm."""
        found = {name: getattr(one, "table_streams", ()) for name, one in self.chosen().items()}
        return {name: streams for name, streams in found.items() if streams}

    @property
    def streams_read(self) -> dict[str, tuple[str, ...]]:
        """Return the id streams that the arms read, with tables or without, by arm."""
        of_scone = {"scone": (self.scone.stream,)} if "scone" in self.chosen() else {}
        return self.table_streams | of_scone

    @property
    def makes_ngrams(self) -> bool:
        """Return whether a Transformer makes the embeddings of n-grams."""
        return "scone" in self.chosen() and self.scone.kind == "model"
