"""Two smooth valleys in the KV capacity of one arm, which no sizing law has: for the engine `simulated`.

The function is given a configuration, the arm's name and the numbers of `landscape.parameters`; it returns bytes, or
None where there is no capacity. It runs in the worker, with what every arm's Python has.
"""

from __future__ import annotations

import math

GIB = 1 << 30


def kv_cache_bytes(configuration: dict[str, float], arm: str, parameters: dict[str, float]) -> float | None:
    batch = math.log2(configuration["max_batch_size"])
    tokens = math.log2(configuration["max_num_tokens"])
    fraction = configuration["memory_fraction"]
    if fraction > 0.85 and tokens > 14:
        return None
    whole = parameters["whole_gib"] * fraction
    if arm == "container":
        for centre in ((2, 9, 0.7), (7, 13, 0.5)):
            far = (
                (batch - centre[0]) ** 2 / 2
                + (tokens - centre[1]) ** 2 / 2
                + ((fraction - centre[2]) / 0.15) ** 2
            )
            whole -= parameters["depth_gib"] * math.exp(-far / 2)
    return whole * GIB
