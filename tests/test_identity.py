"""What a model folder says of itself: KV bytes of a token by hand-checked configurations, weights by their headers."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_ray.measurements import ModelInfo
from spark_ray.worker import identity

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = LLAMA_8B | {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}


def write_tensors(path, tensors):
    """A safetensors file with this header; its data is a hole."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, *shape) in tensors.items():
        size = WIDTHS[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def folder_with(folder, config, tensors=None, **files):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        write_tensors(folder / "model.safetensors", tensors)
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (LLAMA_8B, (), 32 * 2 * 8 * 128 * 2),
        (LLAMA_8B, ("fp8",), 32 * 2 * 8 * 128),
        (LLAMA_8B, ("nvfp4",), 32 * 2 * 8 * 128 * 9 // 16),
        (LLAMA_8B, ("auto", 8), 32 * 2 * 1 * 128 * 2),
        (LLAMA_8B, ("auto", 3), 32 * 2 * 3 * 128 * 2),  # the fullest of three
        (LLAMA_8B | {"num_key_value_heads": 1}, ("auto", 4), 32 * 2 * 1 * 128 * 2),  # MQA: each GPU has the one head
        ({k: v for k, v in LLAMA_8B.items() if k != "num_key_value_heads"}, (), 32 * 2 * 32 * 128 * 2),
        (LLAMA_8B | {"head_dim": 64}, (), 32 * 2 * 8 * 64 * 2),
        (LLAMA_8B | {"sliding_window": 4096, "use_sliding_window": False}, (), 131072),
        (LLAMA_8B | {"layer_types": ["full_attention"] * 32}, (), 131072),
        (DEEPSEEK_V3, (), 61 * (512 + 64) * 2),
        (DEEPSEEK_V3, ("auto", 8), 61 * (512 + 64) * 2),  # the latent is on every GPU whole
        (DEEPSEEK_V3, ("fp8",), 61 * (512 + 64)),
        ({"text_config": LLAMA_8B, "vision_config": {}}, (), 131072),
        (LLAMA_8B, ("auto", 1, "float32"), 2 * 131072),
    ],
)  # fmt: skip
def test_kv_bytes_of_a_token(tmp_path, config, options, expected):
    assert identity.kv_bytes_per_token(folder_with(tmp_path, config), *options) == expected


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GPT_OSS, "its layers differ"),
        (LLAMA_8B | {"sliding_window": 4096}, "a layer may keep a window only"),
        (LLAMA_8B | {"hybrid_override_pattern": "M-M*"}, "a hybrid"),
        (LLAMA_8B | {"full_attention_interval": 4}, "a hybrid"),
        (LLAMA_8B | {"num_kv_shared_layers": 10}, "of its own for every token"),
        (DEEPSEEK_V3 | {"index_head_dim": 128}, "sparse attention"),
        (LLAMA_8B | {"is_encoder_decoder": True}, "two caches"),
        (LLAMA_8B | {"num_key_value_heads": [8, 4]}, "no num_key_value_heads"),
        (LLAMA_8B | {"model_type": "falcon", "num_key_value_heads": None}, "no num_key_value_heads"),
        (LLAMA_8B | {"model_type": "gemma"}, "no head_dim"),
        (LLAMA_8B | {"torch_dtype": "float32"}, "where weights are float32"),
        (LLAMA_8B | {"num_hidden_layers": 0}, "no num_hidden_layers"),
    ],
)
def test_what_is_not_known_is_no_number(tmp_path, config, why):
    found = identity.of(folder_with(tmp_path, config))
    assert found["bytes_per_token"] is None
    assert why in found["absent"]["bytes_per_token"]


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"hf_quant_config": {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}}, 1.0),
        ({"hf_quant_config": {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}}}, 9 / 16),
        ({"hf_quant_config": {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}}, 2.0),
        ({"hf_quant_config": {"quant_method": "modelopt", "kv_cache_scheme": {"type": "float", "num_bits": 8}}}, 1.0),
        ({"hf_quant_config": {"quantization": {"kv_cache_quant_algo": "INT2"}}}, None),
    ],
)  # fmt: skip
def test_the_checkpoints_own_quantization_counts_where_none_is_asked_for(tmp_path, files, kind):
    folder = folder_with(tmp_path, LLAMA_8B, **files)
    values = 32 * 2 * 8 * 128
    assert identity.of(folder)["bytes_per_token"] == (None if kind is None else values * kind)
    assert identity.of(folder, "fp8")["bytes_per_token"] == values, "what is asked for counts before it"


def test_quantization_inside_config_json_counts_after_the_file(tmp_path):
    inside = {"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": {"type": "float", "num_bits": 8}}}  # fmt: skip
    folder = folder_with(tmp_path, LLAMA_8B | inside)
    assert identity.of(folder)["bytes_per_token"] == 65536
    (folder / "hf_quant_config.json").write_text('{"quantization": {"kv_cache_quant_algo": null}}')
    assert identity.of(folder)["bytes_per_token"] == 131072


@given(
    layers=st.integers(1, 100), heads=st.integers(1, 64), dim=st.sampled_from([64, 80, 96, 128, 256]), ranks=st.integers(1, 16)
)  # fmt: skip
def test_types_and_ranks_scale_it(tmp_path_factory, layers, heads, dim, ranks):
    config = LLAMA_8B | {"num_hidden_layers": layers, "num_key_value_heads": heads, "head_dim": dim}
    folder = folder_with(tmp_path_factory.getbasetemp() / "scaled", config)
    whole, each = (identity.kv_bytes_per_token(folder, "auto", n) for n in (1, ranks))
    assert identity.kv_bytes_per_token(folder, "fp8") * 2 == whole
    assert identity.kv_bytes_per_token(folder, "nvfp4") * 32 == whole * 9
    assert each * ranks >= whole > each * ranks - whole * ranks // heads


# ---- weights ----------------------------------------------------------------------------------------------

DENSE = {
    "model.embed_tokens.weight": ("BF16", 1000, 64), "lm_head.weight": ("BF16", 1000, 64),
    "model.layers.0.mlp.up_proj.weight": ("BF16", 64, 256), "model.layers.0.norm.weight": ("F32", 64),
}  # fmt: skip


def test_weights_are_those_of_the_headers(tmp_path):
    folder = folder_with(tmp_path, LLAMA_8B, DENSE)
    found = identity.weights(folder)
    assert found.disk_bytes == 2 * 1000 * 64 * 2 + 64 * 256 * 2 + 64 * 4
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size > found.disk_bytes
    assert found.loaded_bytes == found.disk_bytes - 64 * 2, "the float32 norm is loaded as bfloat16"
    assert found.decode_bytes == found.loaded_bytes - 1000 * 64 * 2, "of the table of tokens one row is read"
    assert identity.weights(folder, "float32").loaded_bytes == 4 * (2 * 1000 * 64 + 64 * 256 + 64)


def test_a_table_that_is_the_head_as_well_is_read_whole(tmp_path):
    tied = {name: shape for name, shape in DENSE.items() if name != "lm_head.weight"}
    found = identity.weights(folder_with(tmp_path, LLAMA_8B | {"tie_word_embeddings": True}, tied))
    assert found.decode_bytes == found.loaded_bytes


def test_of_a_mixture_of_experts_the_active_share_is_read(tmp_path):
    moe = DENSE | {f"model.layers.0.mlp.experts.{n}.w1": ("F8_E4M3", 64, 64) for n in range(8)}
    config = LLAMA_8B | {"num_experts": 8, "num_experts_per_tok": 2}
    found = identity.weights(folder_with(tmp_path, config, moe))
    assert found.loaded_bytes - found.decode_bytes == 1000 * 64 * 2 + 6 * 64 * 64
    unsaid = identity.weights(folder_with(tmp_path, LLAMA_8B | {"num_experts": 8}, moe))
    assert unsaid.decode_bytes is None
    assert "the share of its weights" in unsaid.decode_unknown


def test_layers_that_predict_further_tokens_are_not_read(tmp_path):
    more = DENSE | {
        "model.layers.32.mlp.up_proj.weight": ("BF16", 64, 256),
        "mtp.fc.weight": ("BF16", 64, 64),
    }
    plain, longer = (identity.weights(folder_with(tmp_path, LLAMA_8B, each)) for each in (DENSE, more))
    assert longer.decode_bytes == plain.decode_bytes


def test_only_files_of_the_index_count(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "consolidated.safetensors"):
        write_tensors(tmp_path / name, {name: ("BF16", 100)})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    folder = folder_with(tmp_path, LLAMA_8B, **{"model.safetensors.index": index})
    assert identity.weights(folder).disk_bytes == 400
    (folder / "b.safetensors").unlink()
    with pytest.raises(identity.Unknown, match=r"b\.safetensors cannot be read"):
        identity.weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../etc/passwd"}}')
    with pytest.raises(identity.Unknown, match="no file of this folder"):
        identity.weights(folder)


def test_a_folder_in_the_words_of_the_record(tmp_path):
    folder = folder_with(tmp_path / "model", LLAMA_8B, DENSE)
    (tmp_path / "link").symlink_to(folder)
    found = identity.of(tmp_path / "link")
    assert found["resolved_path"] == str(folder)
    assert found["config_sha256"] == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert found["architecture"] == "LlamaForCausalLM"
    assert "absent" not in found
    assert (
        ModelInfo.model_validate({"weight_bytes": 1, **found}).disk_bytes
        == identity.weights(folder).disk_bytes
    )
    assert identity.vocabulary(folder) == 128256


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    found = identity.of(tmp_path)
    assert "config.json cannot be read" in found["absent"]["config_sha256"]
    ModelInfo.model_validate({"weight_bytes": 1, **found})


ODD = [None, True, -1, 0, 2**70, 1.5, "x", "\n", [], ["a"], {}, {"a": 1}, {"type": "float", "num_bits": 4}]
KEYS = [
    *LLAMA_8B,
    *DEEPSEEK_V3,
    "layer_types",
    "quantization_config",
    "text_config",
    "num_experts",
    "head_dim",
]
HEADERS = st.builds(lambda **each: json.dumps({"w": each}).encode(), data_offsets=st.sampled_from([*ODD, [0, 8], [8, 0]]), shape=st.sampled_from([*ODD, [2, 2]]), dtype=st.sampled_from([*ODD, "BF16"]))  # fmt: skip


@given(
    changed=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ODD), max_size=4),
    whole=st.sampled_from([*ODD, LLAMA_8B, DEEPSEEK_V3]),
    header=HEADERS | st.binary(max_size=20),
    rest=st.integers(-2, 20),
)
def test_a_strangers_folder_never_raises_and_fits_the_record(tmp_path_factory, changed, whole, header, rest):
    folder = tmp_path_factory.getbasetemp() / "strange"
    folder_with(folder, whole | changed if isinstance(whole, dict) else whole)
    data = len(header).to_bytes(8, "little") + header + bytes(max(0, rest))
    (folder / "model.safetensors").write_bytes(data[: len(data) + min(0, rest)])
    ModelInfo.model_validate({"weight_bytes": 1, **identity.of(folder)})
