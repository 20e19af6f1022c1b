# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""config.json of a Hugging Face decoder as our `ModelConfig`, and back."""

from jtok_jax.errors import ConfigError
from jtok_jax.model_config import ModelConfig
from jtok_jax.rope import RopeScaling, parse_rope_scaling

# Pre-norm decoders with rotary attention and SwiGLU; what each class adds to Llama.
LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
KNOWN = (LLAMA, MISTRAL, QWEN2, QWEN3)
REQUIRED = {  # their field: ours
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}


def model_config(values: dict, *, dtype: str = "") -> ModelConfig:
    """Return the model that a config.json describes.

    Args:
        values: the file.
        dtype: of the parameters, "float32" or "bfloat16"; "": that of the file.

    Raises:
        ConfigError: the architecture is not one of `KNOWN`, or it has a part that is not here.
    """
    name = (values.get("architectures") or ["none"])[0]
    if name not in KNOWN:
        raise ConfigError(f"architectures is {name}; known are {', '.join(KNOWN)}.")
    missing = [field for field in REQUIRED if type(values.get(field)) is not int]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be integers of config.json.")
    _refuse_parts(values, name)
    heads, dim = values["num_attention_heads"], values["hidden_size"]
    size = values.get("head_dim") or (128 if name == QWEN3 else dim // heads)
    biases = "qkvo" if values.get("attention_bias") else "none"
    base, scaling = _rope(values)
    return ModelConfig(
        **{ours: values[theirs] for theirs, ours in REQUIRED.items()},
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=0 if size * heads == dim else size,
        head="tied" if values.get("tie_word_embeddings") else "untied",
        qk_norm="rms" if name == QWEN3 else "none",
        attention_bias="qkv" if name == QWEN2 else biases,
        rope_base=base,
        rope_scaling=scaling,
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        param_dtype=dtype or _dtype(values),
    )


def _refuse_parts(values: dict, name: str) -> None:
    """Raise ConfigError where the model has a part that ours has not."""
    windows = values.get("use_sliding_window")
    if name == MISTRAL:  # whose default is a window
        windows = values.get("sliding_window", 4096)
    layers = set(values.get("layer_types") or ()) - {"full_attention"}
    found = {
        "auto_map": "code of its own" if values.get("auto_map") else "",
        "quantization_config": "quantised weights" if values.get("quantization_config") else "",
        "hidden_act": values.get("hidden_act", "silu").replace("silu", ""),
        "mlp_bias": "biases of the feed-forward" if values.get("mlp_bias") else "",
        "sliding_window": "windows of attention" if windows else "",
        "layer_types": ", ".join(sorted(layers)),
    }
    for field, what in found.items():
        if what:
            raise ConfigError(f"config.json has {what} ({field}), which is not supported here.")


def _rope(values: dict) -> tuple[float, str]:
    """Return model.rope_base and model.rope_scaling; version 5 of transformers joined the two."""
    joined, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    found = joined or scaling
    base = float(joined.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = found.get("rope_type") or found.get("type") or "default"
    if found.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("config.json rotates a part of a head, which is not supported here.")
    try:
        match kind:
            case "default":
                return base, ""
            case "linear":
                return base, str(RopeScaling(kind, float(found["factor"])))
            case "llama3":
                numbers = [
                    float(found[field])
                    for field in ("factor", "low_freq_factor", "high_freq_factor",
                                  "original_max_position_embeddings")
                ]  # fmt: skip
                return base, str(RopeScaling(kind, *numbers))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"config.json has rope parameters of {kind} without {error}.") from error
    raise ConfigError(f"config.json has rope_type {kind}; known are default, linear and llama3.")


def _dtype(values: dict) -> str:
    """Return the dtype that the parameters are stored in; float16 becomes float32."""
    found = values.get("dtype") or values.get("torch_dtype") or "float32"
    return "bfloat16" if found == "bfloat16" else "float32"


def architecture(config: ModelConfig) -> str:
    """Return the class of transformers that has the parts of a backbone.

    Raises:
        ConfigError: none has.
    """
    if config.moe.num_experts:
        raise ConfigError("A backbone with experts is none of Hugging Face's decoders.")
    plain = {"model.pattention.kind": (config.pattention.kind, "none"),
             "model.block_norm": (config.block_norm, "rms"),
             "model.rope_fraction": (config.rope_fraction, 1.0)}  # fmt: skip
    for name, (value, expected) in plain.items():
        if value != expected:
            raise ConfigError(
                f"{name} is {value}; decoders of Hugging Face that are known here have {expected}."
            )
    parts = config.qk_norm, config.attention_bias
    found = {
        ("none", "none"): LLAMA, ("none", "qkvo"): LLAMA, ("none", "qkv"): QWEN2,
        ("rms", "none"): QWEN3, ("rms", "qkvo"): QWEN3,
    }  # fmt: skip
    if parts not in found:
        raise ConfigError(
            f"No decoder of Hugging Face has model.qk_norm={parts[0]} with "
            f"model.attention_bias={parts[1]}."
        )
    return found[parts]


def to_json(config: ModelConfig, *, positions: int, end_id: int | None) -> dict:
    """Return the config.json of a backbone.

    Args:
        positions: the longest sequence it was trained on.
        end_id: of the token between documents; None: there is no tokenizer.
    """
    name = architecture(config)
    scaling = parse_rope_scaling(config.rope_scaling)
    rope = {"rope_type": "default"}
    if scaling:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling and scaling.kind == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = scaling.low, scaling.high
        rope["original_max_position_embeddings"] = int(scaling.length)
    old = {"rope_theta": config.rope_base, "rope_scaling": rope if scaling else None}
    return {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        **{theirs: getattr(config, ours) for theirs, ours in REQUIRED.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.head == "tied",
        "attention_bias": config.attention_bias == "qkvo",
        "rope_parameters": rope | {"rope_theta": config.rope_base},
        **old,  # for transformers before version 5
        "max_position_embeddings": positions,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "dtype": config.param_dtype,
        "torch_dtype": config.param_dtype,
    }
