# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Exact parameter, FLOP and byte counts, from the configuration alone."""

import dataclasses
import math

from jtok_jax.arms import Parameter, Sizes
from jtok_jax.model_config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
VECTORS = ("norm", "scale", "bias")  # endings of names that no matmul uses and no decay touches
TABLES = ("tables", "table")  # endings of names of vectors by token: JTok's, and those of arms

# Dense bfloat16 matmul FLOP/s of one chip, from the vendors' data sheets (without sparsity).
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device by the longest known prefix of its kind, or None if unknown (CPU)."""
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def arm_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of the arms that are on (jtok_jax/arms), by name; those of layers without L."""
    sizes = Sizes(config.padded_vocab, config.model_dim, config.num_kv_heads, config.head_size)
    places = {"arms": config.arms.parameters, "blocks/arms": config.arms.layer_parameters}
    return {
        f"{place}/{arm}/{name}": parameter
        for place, parameters in places.items()
        for arm, of_arm in parameters(sizes).items()
        for name, parameter in of_arm.items()
    }


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every axis letter of a parameter; arms share one set of letters.

    Raises:
        ValueError: two parameters have one letter with two sizes.
    """
    shape = config.tables_shape or (0, 0, 0)
    sizes = {
        "L": config.num_layers, "D": config.model_dim, "V": config.padded_vocab,
        "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_size,
        "F": config.moe.expert_dim if config.moe.num_experts else config.ffn_dim,
        "E": config.moe.num_experts, "S": config.moe.shared_dim, "M": shape[-3],
        "G": shape[0], "X": shape[-3], "R": config.padded_vocab, "C": config.model_dim,
    }  # fmt: skip
    for name, parameter in arm_parameters(config).items():
        for letter, size in zip(parameter.axes, parameter.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"Axis {letter!r} of {name} is {size}, elsewhere {sizes[letter]}: name it by a "
                    "letter of its own."
                )
    return sizes


def parameter_axes(config: ModelConfig) -> dict[str, str]:
    """Axis letters of every parameter by name; the tables come last."""
    axes = {"embed": "VD", "final_norm": "D"}
    if config.head == "untied":
        axes["head"] = "DV"
    attention = {"norm": "LD", "query": "LDNH", "key": "LDKH", "value": "LDKH", "out": "LNHD"}
    if config.qk_norm == "rms":
        attention |= {"query_norm": "LH", "key_norm": "LH"}
    axes |= {f"blocks/attention/{name}": letters for name, letters in attention.items()}
    if config.moe.num_experts:
        moe = {"norm": "LD", "router": "LDE", "gate": "LEDF", "up": "LEDF", "down": "LEFD"}
        if config.moe.shared_dim:
            moe |= {"shared_gate": "LDS", "shared_up": "LDS", "shared_down": "LSD"}
        axes |= {f"blocks/moe/{name}": letters for name, letters in moe.items()}
    else:
        ffn = {"norm": "LD", "gate": "LDF", "up": "LDF", "down": "LFD"}
        axes |= {f"blocks/ffn/{name}": letters for name, letters in ffn.items()}
    jtok = {} if config.jtok.kind == "none" else {"scale": "LD"}
    if config.jtok.kind == "jtok_m":
        jtok["router"] = "LDM"
        if config.jtok.router_bias:
            jtok["router_bias"] = "LM"
        if config.jtok.router_norm == "own":
            jtok["router_norm"] = "LD"
    axes |= {f"blocks/jtok/{name}": letters for name, letters in jtok.items()}
    for name, parameter in arm_parameters(config).items():
        axes[name] = "L" * name.startswith("blocks/") + parameter.axes
    tables = {"none": {}, "jtok": {"tables": "GRC"}, "jtok_m": {"tables": "GXRC"}}
    return axes | tables[config.jtok.kind]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name."""
    sizes = axis_sizes(config)
    return {
        name: tuple(sizes[letter] for letter in letters)
        for name, letters in parameter_axes(config).items()
    }


@dataclasses.dataclass(frozen=True)
class Counts:
    """Exact integers of one model.

    `active` leaves out routed experts a token does not choose and all tables. FLOPs are per token
    of a sequence of `seq_len`: 2 per multiply-add of every matmul, attention over the causal half,
    table mixing and gating as multiply-adds; norms, softmax, activations and the optimizer are
    left out; so are additions and gates of arms. Training is forward plus twice forward;
    recomputation is not counted.
    """

    backbone: int
    tables: int
    active: int
    active_without_embedding: int
    table_bytes: int
    forward_flops: int
    train_flops: int

    @property
    def total(self) -> int:
        return self.backbone + self.tables


def count(config: ModelConfig, *, seq_len: int) -> Counts:
    """Counts of `config`; see `Counts` for what they include."""
    shapes = parameter_shapes(config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    tables = sizes.pop("tables", 0)
    looked_up = {name for name, of_arm in arm_parameters(config).items() if of_arm.looked_up}
    looked_up |= {name for name in sizes if name.endswith(TABLES)}
    of_arms = sum(sizes.pop(name) for name in looked_up)
    backbone = sum(sizes.values())
    idle = 0
    if config.moe.num_experts:
        routed = sum(sizes[f"blocks/moe/{name}"] for name in ("gate", "up", "down"))
        idle = routed // config.moe.num_experts * (config.moe.num_experts - config.moe.top_k)
    forward = _forward_flops(config, sizes, idle, seq_len)
    return Counts(
        backbone=backbone,
        tables=tables + of_arms,
        active=backbone - idle,
        active_without_embedding=backbone - idle - sizes["embed"] - sizes.get("head", 0),
        table_bytes=tables * BYTES[config.jtok.table_dtype] + of_arms * BYTES["float32"],
        forward_flops=forward,
        train_flops=3 * forward,
    )


def _forward_flops(config: ModelConfig, sizes: dict[str, int], idle: int, seq_len: int) -> int:
    jtok = config.jtok
    carrying = len(jtok.table_layers(config.num_layers))
    used = sum(size for name, size in sizes.items() if not name.endswith(VECTORS)) - idle
    used -= sizes["embed"]
    if config.head == "tied":
        used += sizes["embed"]
    router = sizes.get("blocks/jtok/router", 0)
    used -= router - router // config.num_layers * carrying
    # Scores and mixing over (seq_len + 1) / 2 keys on average: 2 x 2 x keys x N x H.
    attention = 2 * (seq_len + 1) * config.num_heads * config.head_size * config.num_layers
    modulation = 2 * (jtok.rows_per_token + 1) * config.model_dim * carrying
    return 2 * used + attention + modulation
