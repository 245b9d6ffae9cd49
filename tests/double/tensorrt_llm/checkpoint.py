"""A Hugging Face folder as the engine sees it: shape, KV bytes of a token, weights, and reading the files for real."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PIECE = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, from the headers alone."""
        return sum(_tensor_bytes(path) for path in self.files)

    def read_weights(self) -> None:
        """Every byte of every weight file goes through the page cache, as when weights are loaded."""
        for path in self.files:
            with path.open("rb", buffering=0) as stream:
                while stream.read(_PIECE):
                    pass

    def kv_bytes_per_token(self, dtype: str, tensor_parallel_size: int) -> int:
        """Two (or, with MLA, one) vectors a layer and head, in the cache's type."""
        config = self.config
        size = self._element_bytes(dtype)
        if "kv_lora_rank" in config:
            width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
            return math.ceil(config["num_hidden_layers"] * width * size)
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = math.ceil(config.get("num_key_value_heads", heads) / tensor_parallel_size)
        return math.ceil(2 * config["num_hidden_layers"] * kv_heads * head_dim * size)

    def _element_bytes(self, dtype: str) -> float:
        if dtype == "fp8":
            return 1
        if dtype == "nvfp4":
            return 1 / 2 + 1 / 16  # and one FP8 scale for 16 values
        model = str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16")
        return 4 if model.endswith("float32") else 2


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return sum(
        each["data_offsets"][1] - each["data_offsets"][0]
        for name, each in header.items()
        if name != "__metadata__"
    )


def load(folder: str) -> Checkpoint:
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"Failed to load the model from {folder}: {error}") from error
    return Checkpoint(path, config)
