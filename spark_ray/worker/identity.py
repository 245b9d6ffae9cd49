"""Which model a folder holds, by its files alone: hash, size of the weights, KV bytes of a token. Nothing is loaded.

A number is only given where config.json and the headers of the weight files say it; else it is None with a reason.
Reading touches the headers alone (readahead is off), so that it hardly moves the page cache that a trial is about.

KV bytes of one token, on one GPU: layers x 2 x ceil(kv_heads / tensor parallel) x head_dim x bytes of a value. With
multi-head latent attention (MLA) keys and values share one vector, on every GPU whole: layers x (kv_lora_rank +
qk_rope_head_dim) x bytes of a value. NVFP4 packs two values in a byte and adds one FP8 scale for each 16.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST_JSON_BYTES = 64 << 20
_MOST_TOKEN_BYTES = 1 << 30
_FLOATS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_TYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_DIVIDED = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "phi3"})
"""Model types whose head_dim is hidden_size / num_attention_heads where config.json has none; others have a default of their own."""
_WINDOWED = ("attention_chunk_size", "cross_attention_layers", "num_kv_shared_layers", "block_configs")
_STATEFUL = (
    "hybrid_override_pattern", "layers_block_type", "attn_layer_period", "full_attention_interval",
    "linear_num_key_heads", "linear_attn_config", "ssm_state_size", "mamba_d_state", "mamba_num_heads",
)  # fmt: skip
_SPARSE = ("index_head_dim", "compress_ratios", "sparse_attention_config")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "experts_per_token", "moe_topk", "top_k_experts")
_TABLES = ("embed", "wte", "wpe")  # of which one token needs one row


class Unknown(Exception):
    """The files do not say it; the message says why not."""


# ---- files ------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_JSON_BYTES + 1)
        if len(data) > _MOST_JSON_BYTES:
            raise Unknown(f"{path.name} is larger than {_MOST_JSON_BYTES >> 20} MiB")
        found = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise Unknown(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise Unknown(f"{path.name} is not an object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that a loader takes: those of the index, or model.safetensors, or every *.safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise Unknown(f"{index.name} has no weight_map")
        names = sorted(set(named.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise Unknown(f"{index.name} names {outside[0]!r}, which is no file of this folder")
        files = [folder / name for name in names]
    else:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise Unknown("the folder holds no *.safetensors")
    return files


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # as the format names it: BF16, F8_E4M3, U8 …
    values: int
    size_bytes: int


def _tensors(path: Path) -> Iterator[Tensor]:
    """What the header of one safetensors file lists."""
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            length = int.from_bytes(file.read(8), "little")
            room = os.fstat(file.fileno()).st_size - 8 - length
            if not 2 <= length <= _MOST_HEADER_BYTES or room < 0:
                raise Unknown(f"{path.name} is not a whole safetensors file")
            header = json.loads(file.read(length))
        for name, each in header.items():
            if name != "__metadata__":
                begin, end = each["data_offsets"]
                if not 0 <= int(begin) <= int(end) <= room:
                    raise Unknown(f"{path.name} has no room for its tensor {name[:80]!r}")
                values = 1
                for extent in each["shape"]:
                    values *= int(extent)
                yield Tensor(name, str(each["dtype"]), values, int(end) - int(begin))
    except OSError as error:
        raise Unknown(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unknown(f"{path.name} has no safetensors header: {error}") from None


# ---- weights ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The weights of a folder: as they are on disk, as a loader holds them, and what one decoding step must read."""

    disk_bytes: int  # of all tensors
    file_bytes: int  # of the files: headers as well
    loaded_bytes: int  # with 16, 32 and 64 bit floats in the type they are loaded in
    decode_bytes: int | None  # at least, for one token
    decode_unknown: str | None = None  # why not
    has_states: bool = False  # a hybrid: some layers keep a state for each request


def weights(folder: Path, dtype: str = "auto") -> Weights:
    """Sizes by the headers. `dtype`: bfloat16, float32 …; auto: as config.json says. Raises Unknown."""
    config = _read_json(folder / "config.json")
    files = weight_files(folder)
    tensors = [tensor for path in files for tensor in _tensors(path)]
    wide = _TYPES.get(_dtype_of(config) if dtype == "auto" else dtype)
    held = {tensor.name: _loaded_bytes(tensor, wide) for tensor in tensors}
    why, decode = None, None
    try:
        decode = _decode_bytes(held, config)
    except Unknown as error:
        why = str(error)
    return Weights(
        disk_bytes=sum(tensor.size_bytes for tensor in tensors),
        file_bytes=sum(path.stat().st_size for path in files),
        loaded_bytes=sum(held.values()),
        decode_bytes=decode,
        decode_unknown=why,
        has_states=bool(_said(_text(config), _STATEFUL)),
    )


def _loaded_bytes(tensor: Tensor, wide: int | None) -> int:
    return tensor.values * wide if wide and tensor.dtype in _FLOATS else tensor.size_bytes


def _decode_bytes(held: Mapping[str, int], config: Mapping[str, Any]) -> int:
    """Bytes of weights that making one token takes at the least: no table that is only looked up, no idle expert."""
    if config.get("is_encoder_decoder") or any(key in config for key in ("vision_config", "audio_config")):
        raise Unknown("not every part of this model takes part in every token")
    text = _text(config)
    experts, active = (
        next((text[key] for key in keys if _counts(text.get(key))), None) for keys in (_EXPERTS, _ACTIVE)
    )
    of_experts = sum(size for name, size in held.items() if ".experts." in name)
    if bool(of_experts) != (experts is not None) or (of_experts and (active is None or active > experts)):
        raise Unknown("mixture of experts: the share of its weights that one token uses is not known")
    is_head = text.get("tie_word_embeddings", config.get("tie_word_embeddings")) is True
    is_head = is_head and not any(
        "lm_head" in name for name in held
    )  # then the table of tokens is read whole
    layers = text.get("num_hidden_layers")
    total = 0
    for name, size in held.items():
        is_table = any(word in name for word in _TABLES)
        if (is_table and not is_head) or _is_draft_layer(name, layers):
            continue
        total += size * active // experts if ".experts." in name and experts and active else size
    return total


def _is_draft_layer(name: str, layers: object) -> bool:
    """Layers beyond the model's own predict further tokens at once, and only where that is asked for."""
    if name.startswith("mtp."):
        return True
    _, found, rest = name.partition("layers.")
    number = rest.partition(".")[0]
    return bool(found) and isinstance(layers, int) and number.isdecimal() and int(number) >= layers


# ---- KV bytes of a token ----------------------------------------------------------------------------------


def _counts(value: object) -> bool:
    return type(value) is int and value > 0


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _said(text: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Which of these keys a configuration has, and not as nothing."""
    return [key for key in keys if text.get(key) not in (None, False, [], {})]


def dtype_of(folder: Path) -> str:
    """Type of the weights by config.json; empty where it names none. Raises Unknown."""
    return _dtype_of(_read_json(folder / "config.json"))


def _dtype_of(config: Mapping[str, Any]) -> str:
    for part in (_text(config), config):
        for key in ("torch_dtype", "dtype"):
            if isinstance(part.get(key), str):
                return str(part[key])
    return ""


def _refuse_other_caches(config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raise Unknown where some layer keeps less, more or something else than the keys and values of every token."""
    if config.get("is_encoder_decoder"):
        raise Unknown("an encoder-decoder keeps two caches")
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and set(map(str, kinds)) - {"full_attention"}:
        raise Unknown(f"its layers differ ({', '.join(sorted(set(map(str, kinds))))})")
    if _counts(text.get("sliding_window")) and text.get("use_sliding_window") is not False:
        raise Unknown(f"sliding_window {text['sliding_window']}: a layer may keep a window only")
    for keys, why in (
        (_STATEFUL, "a hybrid: some layers keep a state instead of keys and values"),
        (_WINDOWED, "not every layer keeps keys and values of its own for every token"),
        (_SPARSE, "sparse attention keeps an index beside keys and values"),
    ):
        if found := _said(text, keys):
            raise Unknown(f"{found[0]}: {why}")


def _number(text: Mapping[str, Any], key: str) -> int:
    if not _counts(text.get(key)):
        raise Unknown(f"config.json has no {key}")
    return int(text[key])


def _kv_heads(text: Mapping[str, Any]) -> int:
    if "num_key_value_heads" not in text and text.get("model_type") == "llama":
        return _number(text, "num_attention_heads")  # of the first Llamas: each query head has its own
    return _number(text, "num_key_value_heads")


def _head_dim(text: Mapping[str, Any]) -> int:
    if _counts(text.get("head_dim")):
        return int(text["head_dim"])
    if str(text.get("model_type")) not in _DIVIDED:
        raise Unknown("config.json has no head_dim")
    width, heads = _number(text, "hidden_size"), _number(text, "num_attention_heads")
    if width % heads:
        raise Unknown("hidden_size is no multiple of num_attention_heads")
    return width // heads


def _kv_type(folder: Path, config: Mapping[str, Any]) -> str:
    """What the checkpoint says of its KV cache: FP8, NVFP4, INT8, or none."""
    quantization: Any = config.get("quantization_config") or {}
    own = folder / "hf_quant_config.json"
    if own.is_file():  # the file counts where both are there
        quantization = _read_json(own)
    if isinstance(quantization, dict):
        quantization = quantization.get("quantization", quantization)  # older tools write it one level deeper
    if not isinstance(quantization, dict):
        raise Unknown("its quantization is not an object")
    said = quantization.get("kv_cache_quant_algo", quantization.get("kv_cache_scheme"))
    if isinstance(said, dict):
        key = (str(said.get("type")), str(said.get("num_bits")))
        said = {("float", "8"): "FP8", ("float", "4"): "NVFP4", ("int", "8"): "INT8"}.get(
            key, f"{key[0]} {key[1]} bit"
        )
    name = "NONE" if said is None else str(said).upper()
    if name not in {"FP8", "NVFP4", "INT8", "NONE"}:
        raise Unknown(f"its KV cache is quantized in a way not known here: {name[:40]}")
    return name


def _bytes_of(values: int, kind: str, dtype: str) -> int:
    """Bytes of so many values of the cache."""
    if kind in {"FP8", "INT8"}:
        return values
    if kind == "NVFP4":
        if values % 16:
            raise Unknown("its values are no multiple of the 16 that share an NVFP4 scale")
        return values // 2 + values // 16
    return _TYPES[dtype] * values


def kv_bytes_per_token(
    folder: Path, kv_dtype: str = "auto", tensor_parallel_size: int = 1, dtype: str = "auto"
) -> int:
    """KV bytes of one token on one GPU, over all layers. Raises Unknown where the files do not settle it.

    `kv_dtype`: fp8, nvfp4, or auto: what the checkpoint says, else as the weights. `dtype`: of those, as loaded.
    """
    config = _read_json(folder / "config.json")
    text = _text(config)
    _refuse_other_caches(config, text)
    kind = _kv_type(folder, config) if kv_dtype == "auto" else kv_dtype.upper()
    layers = _number(text, "num_hidden_layers")
    if _counts(text.get("kv_lora_rank")):
        if kind == "NVFP4":
            raise Unknown("MLA with an NVFP4 cache differs between versions")
        each = _number(text, "kv_lora_rank") + _number(text, "qk_rope_head_dim")
    else:
        each = 2 * -(-_kv_heads(text) // tensor_parallel_size) * _head_dim(text)
    held = _dtype_of(config) if dtype == "auto" else dtype
    if kind == "NONE" and dtype == "auto" and _TYPES.get(held) != 2:
        raise Unknown(f"the type of its KV cache is not known where weights are {held or 'untyped'}")
    size = _bytes_of(layers * each, kind, held)
    if size >= _MOST_TOKEN_BYTES:
        raise Unknown(f"{size} KV bytes a token are beyond any model")
    return size


# ---- all of it --------------------------------------------------------------------------------------------


def vocabulary(folder: Path) -> int:
    """Tokens of the model's vocabulary. Raises Unknown."""
    return _number(_text(_read_json(folder / "config.json")), "vocab_size")


def of(
    model_path: Path, kv_dtype: str = "auto", tensor_parallel_size: int = 1, dtype: str = "auto"
) -> dict[str, Any]:
    """What the folder says, as fields of `ModelInfo`; None with its reason in `absent` for what it does not say."""
    folder = Path(model_path)
    found: dict[str, Any] = {
        "resolved_path": os.path.realpath(folder), "config_sha256": None, "architecture": None,
        "disk_bytes": None, "file_bytes": None, "bytes_per_token": None,
    }  # fmt: skip
    absent: dict[str, str] = {}
    try:
        config = _read_json(folder / "config.json")
        found["config_sha256"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        names = config.get("architectures")
        if (
            isinstance(names, list)
            and names
            and isinstance(names[0], str)
            and names[0].isprintable()
            and names[0]
        ):
            found["architecture"] = names[0][:200]
        else:
            absent["architecture"] = "config.json names no architectures"
        sizes = weights(folder)
        found |= {"disk_bytes": sizes.disk_bytes, "file_bytes": sizes.file_bytes}
    except (Unknown, OSError) as error:
        absent["config_sha256" if found["config_sha256"] is None else "disk_bytes"] = str(error)
    try:
        found["bytes_per_token"] = kv_bytes_per_token(folder, kv_dtype, tensor_parallel_size, dtype)
    except Unknown as error:
        absent["bytes_per_token"] = str(error)
    return found | ({"absent": absent} if absent else {})
