# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok and JTok-M (arXiv 2602.00800) for JAX.

Axis letters, used as suffixes of array names everywhere in this package:

    B  sequences            T  tokens of a sequence     D  model width
    N  query heads          K  key-value heads          H  head width
    F  feed-forward width   E  experts                  S  shared-expert width
    M  token tables a layer (n_e)                       k  chosen experts or tables
    L  layers               V  vocabulary               U  unique tokens of a step
    X  cached positions     R  rows: tokens of a batch, flattened (B*T)
    G  stacked tables: layers that carry tables, or 1 where all share one

Axes of tables have letters of their own, as they are split otherwise: X for M, R for rows and C for
columns (`mesh.table_rules`). Small letters are those of single layers.
"""

import importlib

__version__ = "0.1.0"
_PUBLIC = {  # loaded when asked for: options alone need no Flax and no kernel
    "JTok": "jtok_jax.model.jtok",
    "JTokM": "jtok_jax.model.jtok",
    "ModelConfig": "jtok_jax.model_config",
    "Sampling": "jtok_jax.inference.sampling",
    "Transformer": "jtok_jax.model.transformer",
    "load": "jtok_jax.loading",
}
__all__ = list(_PUBLIC)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jtok_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
