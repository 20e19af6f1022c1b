# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok and JTok-M on a stock decoder of transformers, in PyTorch: one file, copied beside a model.

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    add_tables(model, FOLDER)
    model.generate(...)

Reads jtok.json and jtok.safetensors of the folder. Equations: arXiv 2602.00800, Eq. 7 to 13.
"""

import json
import pathlib

import safetensors.torch
import torch


class Tables(torch.nn.Module):
    """The rows of all layers by token id, and what each layer does with its own."""

    def __init__(self, folder):
        super().__init__()
        folder = pathlib.Path(folder)
        self.options = json.loads((folder / "jtok.json").read_text())
        for name, value in safetensors.torch.load_file(folder / "jtok.safetensors").items():
            self.register_buffer(name, value, persistent=False)
        self.ids = self.routed_by = None

    def rows(self, layer: int) -> torch.Tensor:
        """Return float32 rows [B, T, D], or [B, T, M, D], of a layer's tables."""
        return self.tables[self.ids, self.options["table_of_layer"][layer]].float()

    def normed(self, e: torch.Tensor) -> torch.Tensor:
        """Return Norm_eps(e) = e / (|e| + eps)."""
        square = e.square()
        reduced = square.mean(-1, True) if self.options["norm"] == "rms" else square.sum(-1, True)
        return e / (reduced.clamp(min=1e-30).sqrt() + self.options["eps"])

    def mixture(self, layer: int) -> torch.Tensor:
        """Return sum_i w_i E_i[ids] over the chosen tables, Eq. 10 and 11."""
        x = self.routed_by.float()
        if self.options["router_norm"] != "shared":
            x = x * torch.rsqrt(x.square().mean(-1, True) + self.options["router_norm_eps"])
        if self.options["router_norm"] == "own":
            x = x * self.router_norm[layer]
        logits = x @ self.router[layer]
        if hasattr(self, "router_bias"):
            logits = logits + self.router_bias[layer]
        chosen, choice = logits.topk(self.options["top_k"])
        weights = torch.softmax(torch.nn.functional.logsigmoid(chosen), dim=-1)
        index = choice[..., None].expand(*choice.shape, x.shape[-1])
        return (self.rows(layer).gather(-2, index) * weights[..., None]).sum(-2)

    def change(self, layer: int, delta: torch.Tensor) -> torch.Tensor:
        """Return a layer's feed-forward increment, gated (JTok) or with rows added (JTok-M)."""
        scale = self.scale[layer]
        if self.options["kind"] == "jtok":
            gate = 1 + scale * self.normed(self.rows(layer))
            return (delta.float() * gate).to(delta.dtype)
        added = self.options["depth_scale"] * scale * self.normed(self.mixture(layer))
        return delta + added.to(delta.dtype)


def add_tables(model, folder) -> Tables:
    """Make a Llama, Mistral or Qwen of transformers read the tables of a folder; return them."""
    tables = Tables(folder).to(model.device)
    decoder, before = model.model, tables.options["router_input"] == "pre_attention"

    def keep_ids(module, args, kwargs):
        tables.ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    decoder.register_forward_pre_hook(keep_ids, with_kwargs=True)
    for layer, index in enumerate(tables.options["table_of_layer"]):
        if index < 0:
            continue
        block = decoder.layers[layer]
        norm = block.input_layernorm if before else block.post_attention_layernorm

        def keep_input(module, args, out):
            tables.routed_by = out if tables.options["router_norm"] == "shared" else args[0]

        def change(module, args, out, layer=layer):
            return tables.change(layer, out)

        norm.register_forward_hook(keep_input)
        block.mlp.register_forward_hook(change)
    return tables
