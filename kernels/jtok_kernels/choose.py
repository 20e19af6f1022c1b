# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which implementation runs: the one asked for, or an error; None is chosen by platform."""

IMPLEMENTATIONS = ("xla",)


def choose(implementation: str | None) -> str:
    """The name of the implementation to use.

    Raises:
        ValueError: there is none of that name.
    """
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}."
        )
    return implementation
