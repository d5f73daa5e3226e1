"""GGUF files, read back with ``gguf.GGUFReader``: header, tensors, values, and how they come to be."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import saap
from saap.serving.gguf_export import export_gguf
from saap.serving.gguf_tensors import Weights
from tests.serving.gguf_models import (
    ALL,
    DIFFERENT,
    HEAD_DIM,
    HIDDEN,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    UNIFORM,
    VOCABULARY,
    model_of,
    saved,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")
KV, WIDTHS = [4, 3, 1], [128, 32, 96]  # of DIFFERENT


def read(file: Path) -> tuple[gguf.GGUFReader, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    return reader, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def field(reader: gguf.GGUFReader, name: str):
    return reader.fields[name].contents()


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Row by row: first half j of each head to 2 j, second half to 2 j + 1."""
    found = np.empty_like(rows)
    for row in range(len(rows)):
        head, j = divmod(row, head_dim)
        half, place = divmod(j, head_dim // 2)
        found[head * head_dim + 2 * place + half] = rows[row]
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_sizes_of_every_layer_stand_in_arrays_of_deci(tmp_path, family) -> None:
    folder = saved(tmp_path / "model", family, DIFFERENT)
    reader, tensors = read(export_gguf(folder, tmp_path / "x.gguf", "f32"))
    assert field(reader, "general.architecture") == "deci"
    assert field(reader, "deci.attention.head_count") == [2 * kv for kv in KV]
    assert field(reader, "deci.attention.head_count_kv") == KV
    assert field(reader, "deci.feed_forward_length") == WIDTHS
    expected = {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM, "rope.dimension_count": HEAD_DIM}
    expected |= {"block_count": 3, "embedding_length": HIDDEN, "context_length": 64, "vocab_size": VOCABULARY}
    for name, value in expected.items():
        assert field(reader, f"deci.{name}") == value
    for index, (kv, width) in enumerate(zip(KV, WIDTHS, strict=True)):
        shapes = {"attn_q": (2 * kv * HEAD_DIM, HIDDEN), "attn_k": (kv * HEAD_DIM, HIDDEN)}
        shapes |= {"attn_v": (kv * HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, 2 * kv * HEAD_DIM)}
        shapes |= {"ffn_gate": (width, HIDDEN), "ffn_up": (width, HIDDEN), "ffn_down": (HIDDEN, width)}
        for name, shape in shapes.items():
            assert tensors[f"blk.{index}.{name}.weight"].shape == shape


@pytest.mark.parametrize(
    "family, kept, architecture",
    [
        ("llama", ALL, "llama"),
        ("mistral", UNIFORM, "llama"),
        ("qwen2", ALL, "qwen2"),
        ("qwen2", UNIFORM, "deci"),  # llama.cpp's qwen2 wants as many rows of q as hidden_size
        ("qwen3", UNIFORM, "qwen3"),
    ],
)
def test_layers_of_one_size_get_the_plain_architecture(tmp_path, family, kept, architecture) -> None:
    folder = saved(tmp_path / "model", family, kept)
    reader, _ = read(export_gguf(folder, tmp_path / "x.gguf", "f16"))
    assert field(reader, "general.architecture") == architecture
    heads = field(reader, f"{architecture}.attention.head_count")
    assert heads == ([2 * kv for kv, _ in kept] if architecture == "deci" else 2 * kept[0][0])


@pytest.mark.parametrize("family, permuted", [("llama", True), ("qwen2", True), ("qwen3", False)])
def test_every_value_is_there_exactly_in_f32(tmp_path, family, permuted) -> None:
    kept = ALL if family == "qwen3" else DIFFERENT
    folder = saved(tmp_path / "model", family, kept)
    _, tensors = read(export_gguf(folder, tmp_path / "x.gguf", "f32"))
    stored = {name: t.float().numpy() for name, t in load_file(folder / "model.safetensors").items()}
    names = {"input_layernorm": "attn_norm", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"}
    names |= {f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"}
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outside["lm_head.weight"] = "output.weight"
    assert len(tensors) == len(stored)
    for name, values in stored.items():
        if name in outside:
            found = tensors[outside[name]]
        else:
            index, _, rest = name.removeprefix("model.layers.").partition(".")
            path, _, kind = rest.rpartition(".")
            found = tensors[f"blk.{index}.{names[path]}.{kind}"]
            if permuted and path in ("self_attn.q_proj", "self_attn.k_proj"):
                values = interleaved(values, HEAD_DIM)
        np.testing.assert_array_equal(found, values)


def test_openelm_holds_q_k_and_v_in_one_tensor_in_their_own_order(tmp_path) -> None:
    folder = saved(tmp_path / "model", "qwen3", DIFFERENT, tie_word_embeddings=True)
    reader, tensors = read(export_gguf(folder, tmp_path / "x.gguf", "f32"))
    assert field(reader, "general.architecture") == "openelm"
    assert field(reader, "openelm.attention.head_count_kv") == KV
    stored = load_file(folder / "model.safetensors")
    assert "output.weight" not in tensors
    for index in range(3):
        parts = [stored[f"model.layers.{index}.self_attn.{part}_proj.weight"] for part in "qkv"]
        np.testing.assert_array_equal(tensors[f"blk.{index}.attn_qkv.weight"], torch.cat(parts).numpy())
        assert tensors[f"blk.{index}.attn_q_norm.weight"].shape == (HEAD_DIM,)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q5_1", "bf16", "f16"])
def test_types_follow_the_convention_of_llama_quantize(tmp_path, kind, tied) -> None:
    folder = saved(tmp_path / "model", "llama", DIFFERENT, tie_word_embeddings=tied)
    reader, tensors = read(export_gguf(folder, tmp_path / "x.gguf", kind.upper()))
    head = "q8_0" if kind.startswith("q") else kind
    for tensor in reader.tensors:
        expected = "f32" if len(tensor.shape) == 1 else kind
        if tensor.name == ("token_embd.weight" if tied else "output.weight"):
            expected = head
        assert tensor.tensor_type.name.lower() == expected, tensor.name
    assert ("output.weight" in tensors) is not tied
    assert gguf.LlamaFileType(field(reader, "general.file_type")).name == f"MOSTLY_{kind.upper()}"


def test_q8_0_is_within_half_a_step(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama", DIFFERENT)
    _, exact = read(export_gguf(folder, tmp_path / "exact.gguf", "f32"))
    _, rounded = read(export_gguf(folder, tmp_path / "rounded.gguf", "q8_0"))
    for name, values in exact.items():
        if values.ndim == 1:
            np.testing.assert_array_equal(rounded[name], values)
            continue
        blocks = values.reshape(-1, 32)
        step = np.abs(blocks).max(1, keepdims=True) / 127
        # half a step, and what the scale loses in fp16: 2**-11 of it, times at most 127
        worst = np.abs(rounded[name].reshape(-1, 32) - blocks) / step
        assert worst.max() <= 0.5 + 127 * 2**-11
        assert worst.max() > 0.4  # it is rounded at all


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_checkpoints_keep_their_values(tmp_path, dtype) -> None:
    folder = saved(tmp_path / "model", "qwen2", DIFFERENT)
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    _, exact = read(export_gguf(folder, tmp_path / "exact.gguf", "f32"))
    _, half = read(export_gguf(folder, tmp_path / "half.gguf", kind))
    for name, values in exact.items():
        np.testing.assert_array_equal(half[name], values)


def test_llama_3s_rotary_embedding_becomes_factors(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama", DIFFERENT, rope_parameters=LLAMA3_ROPE)
    reader, tensors = read(export_gguf(folder, tmp_path / "x.gguf", "q8_0"))
    # Llama 3.1's rule in full: wavelengths below 16 / 4 stay, above 16 / 1 are 8 times as long, smoothly between
    factors = []
    for j in range(HEAD_DIM // 2):
        turns = 16 / (2 * np.pi * 1e4 ** (2 * j / HEAD_DIM))  # in the original context
        smooth = min(max((turns - 1) / (4 - 1), 0), 1)
        factors.append(1 / ((1 - smooth) / 8 + smooth))
    np.testing.assert_allclose(tensors["rope_freqs.weight"], factors, rtol=1e-5)  # fp32 powers of theta
    assert factors[0] == 8 or factors[-1] == 8
    assert field(reader, "deci.rope.freq_base") == 1e4


def test_linear_rotary_scaling_and_theta_are_written(tmp_path) -> None:
    folder = saved(tmp_path / "model", "qwen2", rope_parameters=LINEAR_ROPE | {"rope_theta": 5e5})
    reader, tensors = read(export_gguf(folder, tmp_path / "x.gguf", "f16"))
    assert field(reader, "qwen2.rope.freq_base") == 5e5
    assert field(reader, "qwen2.rope.scaling.type") == "linear"
    assert field(reader, "qwen2.rope.scaling.factor") == 4.0
    assert "rope_freqs.weight" not in tensors


@pytest.mark.parametrize(
    "family, sliding, context",
    [
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": None}, 64),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, 16),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}, 64),
    ],
)
def test_a_sliding_window_is_the_context_and_that_is_told(tmp_path, family, sliding, context) -> None:
    folder = saved(tmp_path / "model", family, UNIFORM, **sliding)
    told: list[str] = []
    reader, _ = read(export_gguf(folder, tmp_path / "x.gguf", "f16", tell=told.append))
    architecture = field(reader, "general.architecture")
    assert field(reader, f"{architecture}.context_length") == context
    assert any("sliding window" in note and "16 instead of 64" in note for note in told) is (context == 16)


def test_weights_are_read_one_at_a_time(tmp_path, monkeypatch) -> None:
    events = []
    inner, write = Weights.read, gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(Weights, "read", lambda self, name: events.append("read") or inner(self, name))
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_tensor_data", lambda self, data: events.append("write") or write(self, data)
    )
    folder, seen = saved(tmp_path / "model", "llama", DIFFERENT), []
    export_gguf(folder, tmp_path / "x.gguf", "f16", progress=lambda *state: seen.append(state))
    count = len(load_file(folder / "model.safetensors"))
    assert events == ["read", "write"] * count
    assert seen == [(done, count) for done in range(count + 1)]


def test_sharded_checkpoints_and_tied_heads_that_were_saved_twice(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama", DIFFERENT, tie_word_embeddings=True)
    _, whole = read(export_gguf(folder, tmp_path / "whole.gguf", "f32"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    file.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, sharded = read(export_gguf(folder, tmp_path / "sharded.gguf", "f32"))
    assert sharded.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(sharded[name], values)


@pytest.mark.parametrize("family, kept", [("llama", ALL), ("qwen2", DIFFERENT), ("qwen3", DIFFERENT)])
def test_a_model_saved_without_its_head_makes_the_same_file(tmp_path, family, kept) -> None:
    whole = export_gguf(saved(tmp_path / "a/model", family, kept, tie_word_embeddings=True), tmp_path / "a.gguf", "f16")
    model = model_of(family, kept, tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "b/model")
    names = set(load_file(tmp_path / "b/model/model.safetensors"))
    assert "norm.weight" in names and not any(name.startswith("model.") for name in names)
    assert saap.load(tmp_path / "b/model").num_parameters() == model.num_parameters()
    assert export_gguf(tmp_path / "b/model", tmp_path / "b.gguf", "f16").read_bytes() == whole.read_bytes()


def test_a_model_saved_without_the_head_that_it_needs_is_refused_by_the_head_s_name(tmp_path) -> None:
    model_of("llama", ALL, tie_word_embeddings=False).model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected a tensor lm_head.weight in the safetensors files, found none"):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf", "f16")


def test_a_tensor_under_both_names_is_not_taken_twice(tmp_path) -> None:
    file = saved(tmp_path / "model", "llama") / "model.safetensors"
    save_file(load_file(file) | {"norm.weight": torch.zeros(HIDDEN)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="no place for the tensor norm.weight"):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf", "f16")


def test_a_full_disk_leaves_what_was_there(tmp_path) -> None:
    folder, target = saved(tmp_path / "model", "llama"), tmp_path / "out" / "x.gguf"
    target.parent.mkdir()
    target.write_bytes(b"before")
    command = [sys.executable, "-m", "saap", "export", str(folder), "--gguf", str(target), "--type", "f32", "--force"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),  # writing beyond fails
    )
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr
    assert target.read_bytes() == b"before" and os.listdir(target.parent) == ["x.gguf"]


def test_the_command_writes_replaces_and_tells(tmp_path) -> None:
    folder, target = saved(tmp_path / "model", "llama", DIFFERENT), tmp_path / "deep" / "x.gguf"
    command = [sys.executable, "-m", "saap", "export", str(folder), "--gguf", str(target), "--type", "q8_0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"wrote {target}\n"
    assert "note:" in done.stderr and "no tokenizer" in done.stderr
    size = target.stat().st_size
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--force" in done.stderr
    done = subprocess.run([*command[:-1], "f32", "--force"], capture_output=True, text=True)
    assert done.returncode == 0 and target.stat().st_size > 2 * size
    assert oct(target.stat().st_mode & 0o777) == "0o644"
