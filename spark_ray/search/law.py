"""What engines compute their KV capacity from, as columns for a linear fit.

Two families of engines size their pool at start, from what a profiling run left:

    memfree        TensorRT-LLM          KV = fraction x (total - peak)
    memavailable   vLLM, SGLang          KV = fraction x total - peak

and in both, the peak grows with the tokens of a step and with the sequences for which graphs are captured, up to the
largest captured batch (the *knee*, which is not known beforehand). So KV is linear in unknown coefficients, and so is
the difference between two arms of one engine. A family also says in which quantity the noise is even: a disturbed
reading of memory enters KV times the fraction in `memfree`, and as it is in `memavailable`.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Family = Literal["memfree", "memavailable"]

FAMILIES: tuple[Family, ...] = get_args(Family)
KNEE = 128
"""The largest batch with a graph of its own, where nothing else is known: a common default of engines."""
OTHER_KNEES = (32, 64, 256)
KNEE_COLUMN = 2
"""Of the capacity's terms. The other knees are the first of the doubtful ones."""
USUAL_BATCH, USUAL_TOKENS = 16, 2896
"""The interaction is counted in doublings from here, the middle of what is usually searched."""


def gain(family: Family, configurations: Floats) -> Floats:
    """What a byte of memory found free is worth in bytes of KV, and so what the noise of KV is proportional to."""
    return configurations[:, 2] if family == "memfree" else np.ones(len(configurations))


def basis(family: Family, configurations: Floats) -> Floats:
    """Columns (n, k) with KV = basis @ coefficients; configurations (n, 3) are batch, tokens, fraction."""
    return gain(family, configurations)[:, None] * capacity_terms(family, configurations)


def capacity_terms(family: Family, configurations: Floats) -> Floats:
    """The columns of KV per gain that the law is sure of, with the usual knee; the first one is constant."""
    batch, tokens, fraction = configurations.T
    terms = [np.ones(len(batch)), tokens, np.minimum(batch, KNEE)]
    return np.column_stack(terms if family == "memfree" else [*terms, fraction])


def difference_terms(configurations: Floats) -> Floats:
    """The columns of the difference between two arms per gain: an amount, and one that grows with batch and tokens."""
    batch, tokens, _ = configurations.T
    return np.column_stack([np.ones(len(batch)), tokens, np.log2(batch)])


def doubtful_terms(configurations: Floats) -> Floats:
    """Columns that some engine may need: other knees, logarithms, an interaction. How much of them, the data say."""
    batch, tokens, fraction = configurations.T
    knees = [np.minimum(batch, knee) for knee in OTHER_KNEES]
    doublings = np.log2(batch / USUAL_BATCH), np.log2(tokens / USUAL_TOKENS)
    return np.column_stack([*knees, *doublings, doublings[0] * doublings[1], fraction])
