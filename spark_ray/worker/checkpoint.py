"""`python -m spark_ray.worker.checkpoint OUT JSON PARENT`: write a small random-weight Llama checkpoint, in the real format.

Runs with the engine's library, so that it lives beside the engine and the core needs no torch. It ends with the process
PARENT, which may be killed while torch is still at work.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from . import supervise


def make(folder: Path, shape: dict[str, int]) -> None:
    """config.json and model.safetensors (bfloat16) of a Llama of this shape, weights from its seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(shape["seed"])
    config = LlamaConfig(
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["attention_heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    supervise.die_with_parent()
    if os.getppid() != int(sys.argv[3]):
        sys.exit("the process that wanted this checkpoint has ended")
    make(Path(sys.argv[1]), json.loads(sys.argv[2]))
