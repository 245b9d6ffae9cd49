"""The one definition of "diverges": how much KV capacity the arm under question lacks, relative to the baseline."""

from __future__ import annotations


def contrast(baseline_bytes: float, against_bytes: float) -> float:
    """1 - KV(against) / KV(baseline): 0 is no divergence, 0.4 means 40 % less capacity, negative means more.

    Raises:
        ValueError: the baseline has no capacity, so there is nothing to compare with.
    """
    if baseline_bytes <= 0:
        raise ValueError("the baseline has no KV capacity")
    return 1.0 - against_bytes / baseline_bytes
