# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""How models of long context stretch their rotary frequencies: `model.rope_scaling`.

"linear:FACTOR" divides every frequency. "llama3:FACTOR:LOW:HIGH:LENGTH" divides those whose
wavelength is over LENGTH / LOW, keeps those below LENGTH / HIGH, and blends between (Llama 3.1).
"""

import math
from typing import NamedTuple

from jtok_jax.errors import ConfigError


class RopeScaling(NamedTuple):
    """Names are those of Hugging Face's rope_scaling; `low`, `high`, `length`: of llama3."""

    kind: str
    factor: float
    low: float = 0.0  # low_freq_factor
    high: float = 0.0  # high_freq_factor
    length: float = 0.0  # original_max_position_embeddings

    def scaled(self, frequency: float) -> float:
        """Return the frequency, in radians a position, that stands for `frequency`."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.length * frequency / (2 * math.pi)  # in the context it was trained on
        kept = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
        return (1 - kept) * frequency / self.factor + kept * frequency

    def __str__(self):
        numbers = self[1:] if self.kind == "llama3" else self[1:2]
        return ":".join([self.kind, *(f"{number:g}" for number in numbers)])


def parse_rope_scaling(text: str) -> RopeScaling | None:
    """Return what `model.rope_scaling` says; None where it is empty, or its factor is 1.

    Raises:
        ConfigError: it says neither of the two forms, or a number is impossible.
    """
    if not text:
        return None
    kind, *texts = text.split(":")
    try:
        numbers = [float(part) for part in texts]
    except ValueError:
        numbers = []
    sound = all(0 < number < math.inf for number in numbers) and numbers[:1] >= [1.0]
    if sound and len(numbers) == {"linear": 1, "llama3": 4}.get(kind):
        found = RopeScaling(kind, *numbers)
        if kind == "linear" or found.low < found.high:
            return found if found.factor > 1 else None  # computed otherwise, in its last bits
    raise ConfigError(
        f"model.rope_scaling is {text!r}; expected nothing, linear:FACTOR, or "
        "llama3:FACTOR:LOW:HIGH:LENGTH such as llama3:8:1:4:8192, with FACTOR at least 1."
    )
