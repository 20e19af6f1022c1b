# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What JTok and JTok-M are compared with, in the same decoder: one file an arm.

An arm is a frozen dataclass, its options, with some of these methods; the rest it leaves alone:

    parameters(sizes)                     of the whole model, by name
    layer_parameters(sizes)               of every layer
    embed(params, h_BTD, ids_BT)          the stream before the first layer
    values(params, value_BTKH, ids_BT)    of attention
    increment(params, dm_BTD, seen)       of the feed-forward

Arms are pure functions of arrays; several may be on at once, in the order of `ArmsConfig.names`.
Their tables have gradients of a table's size: for comparisons, not for tables that fill a mesh.
"""

import dataclasses

from jtok_jax.arms.adapter import Adapter
from jtok_jax.arms.bigram import Bigram
from jtok_jax.arms.bigram_gate import BigramGate
from jtok_jax.arms.deep_embed import DeepEmbed
from jtok_jax.arms.film import Film
from jtok_jax.arms.low_rank import LowRank
from jtok_jax.arms.mixture import Mixture
from jtok_jax.arms.parameter import Parameter, Params, Seen, Sizes
from jtok_jax.arms.token_gate import TokenGate
from jtok_jax.arms.value_embedding import ValueEmbedding
from jtok_jax.errors import ConfigError

__all__ = ["ArmsConfig", "Parameter", "Params", "Seen", "Sizes"]


@dataclasses.dataclass(frozen=True)
class ArmsConfig:
    """Which arms are on, and the options of all."""

    names: str = ""  # of the fields below, "bigram,film"; empty: none
    adapter: Adapter = dataclasses.field(default_factory=Adapter)
    bigram: Bigram = dataclasses.field(default_factory=Bigram)
    bigram_gate: BigramGate = dataclasses.field(default_factory=BigramGate)
    deep_embed: DeepEmbed = dataclasses.field(default_factory=DeepEmbed)
    film: Film = dataclasses.field(default_factory=Film)
    low_rank: LowRank = dataclasses.field(default_factory=LowRank)
    mixture: Mixture = dataclasses.field(default_factory=Mixture)
    token_gate: TokenGate = dataclasses.field(default_factory=TokenGate)
    value_embedding: ValueEmbedding = dataclasses.field(default_factory=ValueEmbedding)

    def __post_init__(self):
        known = [field.name for field in dataclasses.fields(self)][1:]
        chosen = self.names.split(",") if self.names else []
        for name in chosen:
            if name not in known or chosen.count(name) > 1:
                raise ConfigError(
                    f"model.arms.names is {self.names!r}; expected names, each once, of "
                    f"{', '.join(known)}, with commas between them."
                )

    def chosen(self) -> dict[str, object]:
        """The arms that are on, by name, in order."""
        return {name: getattr(self, name) for name in self.names.split(",") if name}

    def parameters(self, sizes: Sizes) -> dict[str, dict[str, Parameter]]:
        """Of the whole model, by arm and name."""
        return _of(self.chosen(), "parameters", sizes)

    def layer_parameters(self, sizes: Sizes) -> dict[str, dict[str, Parameter]]:
        """Of every layer, by arm and name."""
        return _of(self.chosen(), "layer_parameters", sizes)


def _of(arms: dict[str, object], method: str, sizes: Sizes) -> dict[str, dict[str, Parameter]]:
    return {name: getattr(arm, method)(sizes) for name, arm in arms.items() if hasattr(arm, method)}
