"""Numbers for people."""

from __future__ import annotations

from collections.abc import Mapping


def numbers_in_words(numbers: Mapping[str, float]) -> str:
    """For example ``accuracy 0.982, pruned channels 12``."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
