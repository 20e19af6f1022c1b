# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A dense model with the same weights in Hugging Face's transformers, on the CPU."""

import numpy as np

from jtok_jax.model_config import ModelConfig

# Name in a layer of transformers: ours in `blocks`, with its axes made two.
MATRICES = {
    "self_attn.q_proj": ("attention/query", lambda x: x.reshape(x.shape[0], -1)),
    "self_attn.k_proj": ("attention/key", lambda x: x.reshape(x.shape[0], -1)),
    "self_attn.v_proj": ("attention/value", lambda x: x.reshape(x.shape[0], -1)),
    "self_attn.o_proj": ("attention/out", lambda x: x.reshape(-1, x.shape[-1])),
    "mlp.gate_proj": ("ffn/gate", lambda x: x),
    "mlp.up_proj": ("ffn/up", lambda x: x),
    "mlp.down_proj": ("ffn/down", lambda x: x),
}
NORMS = {"input_layernorm": "attention/norm", "post_attention_layernorm": "ffn/norm"}


class Llama:
    """A LlamaForCausalLM that holds `params`, and its stock `generate`."""

    def __init__(self, config: ModelConfig, params):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise SystemExit(
                f"{error.name} is not installed. In an environment of its own: "
                "pip install -e . torch transformers"
            ) from error
        if config.jtok.kind != "none" or config.moe.num_experts or config.rope_base != 1e4:
            raise SystemExit("Only dense models with model.rope_base=10000 are Llamas.")
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self._torch = torch
        settings = transformers.LlamaConfig(
            vocab_size=config.padded_vocab, hidden_size=config.model_dim,
            intermediate_size=config.ffn_dim, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_size, rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self._model = transformers.LlamaForCausalLM(settings).eval()
        state = {
            name: torch.tensor(np.ascontiguousarray(value, np.float32))
            for name, value in _weights(config, params).items()
        }
        self._model.load_state_dict(state)

    def generate(self, prompts: list[list[int]], *, tokens: int, sampling: tuple) -> np.ndarray:
        """Ids [len(prompts), tokens] that follow prompts of one length.

        Args:
            sampling: temperature, top-k, top-p.
        """
        torch, (temperature, top_k, top_p) = self._torch, sampling
        limits = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature else {}
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            whole = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=0,
                do_sample=bool(limits), **limits,
            )  # fmt: skip
        return whole[:, ids.shape[1] :].numpy()


def _weights(config: ModelConfig, params) -> dict[str, np.ndarray]:
    """Return our parameters by the names of transformers, whose matrices are transposed."""
    values = {name: np.asarray(value) for name, value in params.items()}
    head = values["embed"] if config.head == "tied" else values["head"].T
    found = {"model.embed_tokens.weight": values["embed"], "lm_head.weight": head}
    found["model.norm.weight"] = values["final_norm"]
    for layer in range(config.num_layers):
        start = f"model.layers.{layer}."
        for name, (ours, flat) in MATRICES.items():
            found[f"{start}{name}.weight"] = flat(values[f"blocks/{ours}"][layer]).T
        for name, ours in NORMS.items():
            found[f"{start}{name}.weight"] = values[f"blocks/{ours}"][layer]
    return found
