"""``saap check``: what each target takes of a directory, why not, and directories that cannot be checked at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saap
from saap.plan import LayerPlan, Plan
from saap.serving.check import check, check_all
from saap.serving.targets import BLOCKS, TARGETS
from saap.units import discover
from tests.saap.command_line import run
from tests.saap.tiny import MIXTURES, tiny_model, tiny_tokenizer
from tests.serving.test_targets import wide_model


def saved(folder: Path, kept: list[tuple[int, int]] | None = None, family: str = "llama", **overrides) -> Path:
    """A directory whose layers keep so many (KV heads, channels); all for None."""
    model = tiny_model(family, torch.float32, **overrides)
    units = discover(model)
    if kept is not None:
        layers = tuple(LayerPlan(tuple(range(heads)), tuple(range(width))) for heads, width in kept)
        saap.compact(model, Plan(units, layers, {"allow_empty": True}))
    saap.save(model, folder, tokenizer=tiny_tokenizer())
    return folder


def faults(found) -> list[tuple[int | None, str]]:
    return [(each.layer, each.part) for each in found.findings if each.fault]


ALIGNED = [(4, 96), (2, 64), (4, 32)]  # KV heads with two query heads of 8 each: rows of o of 64, 32 and 64


def test_each_layer_that_is_not_taken_is_named_with_sizes_and_remedy(tmp_path) -> None:
    found = check(saved(tmp_path / "m", [(4, 96), (3, 97), (1, 64)]), "llama.cpp")
    assert not found.valid and faults(found) == [(1, "attention"), (1, "mlp"), (2, "attention")]
    heads, width, _ = found.findings
    assert heads.found == "3 KV heads with 2 query heads each of 8, 48 in a row of o"
    assert heads.needed == "query heads * head_dim to be a multiple of 32"
    assert heads.remedy == "prune with --for llama.cpp, which leaves 2 or fewer"
    assert (width.found, width.needed) == ("97 channels", "a multiple of 32")
    assert width.remedy == "prune with --for llama.cpp, which leaves 96 or fewer"
    assert check(saved(tmp_path / "n", ALIGNED), "llama.cpp").valid


def test_empty_modules_are_named_where_a_target_takes_none(tmp_path) -> None:
    folder = saved(tmp_path / "m", [(4, 96), (0, 64), (4, 0)])
    for target in TARGETS:
        found = check(folder, target)
        empty = [(each.layer, each.found) for each in found.findings if each.found.startswith("no ")]
        assert empty == ([] if target == "transformers" else [(1, "no attention"), (2, "no MLP")])
    assert check(folder, "transformers").valid


@pytest.mark.parametrize("devices", range(1, 9))
def test_devices_that_cannot_share_a_layer(tmp_path, devices: int) -> None:
    """4 + 8, 2 + 4 and 3 + 6 KV and query heads, and widths of 96, 48 and 24."""
    folder = saved(tmp_path / "m", [(4, 96), (2, 48), (3, 24)])
    found = check(folder, "vllm", tensor_parallel=devices)
    expected = []
    for index, (heads, width) in enumerate([(4, 96), (2, 48), (3, 24)]):
        shared = 2 * heads % devices == 0 and (heads % devices == 0 or devices % heads == 0)
        expected += [] if shared else [(index, "attention")]
        expected += [(index, "mlp")] if width % devices else []
    assert faults(found) == expected
    assert all("--tensor-parallel 1" in each.remedy for each in found.findings)
    split = f" --tensor-parallel-size {devices}" if devices > 1 else ""
    assert found.command == f"vllm serve {folder}{split}"


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if not kind.startswith("int")])
def test_gguf_types_ask_for_whole_blocks_in_every_row(tmp_path, kind: str) -> None:
    folder = saved(tmp_path / "m", [(4, 96), (3, 97), (2, 64)])
    block, found = BLOCKS[kind], check(folder, "llama.cpp", type=kind)
    rows = [
        (0, "attention", 64),
        (0, "mlp", 96),
        (1, "attention", 48),
        (1, "mlp", 97),
        (2, "attention", 32),
        (2, "mlp", 64),
    ]
    expected = [(layer, part) for layer, part, row in rows if row % block]
    assert faults(found) == ([(None, "model")] if 64 % block else []) + expected
    assert all(f"for {kind}" in each.needed for each in found.findings if each.layer is not None)
    assert ("llama-quantize" in found.command) is (block == 256)


def test_types_that_a_target_does_not_have_are_refused(tmp_path) -> None:
    folder = saved(tmp_path / "m", ALIGNED)
    for target, kind in (("vllm", "q8_0"), ("llama.cpp", "int4"), ("transformers", "q4_k"), ("edge", "fp8")):
        with pytest.raises(ValueError, match=f"type must be one of .* for target='{target}'; got '{kind}'"):
            check(folder, target, type=kind)


def test_quantised_types_ask_for_whole_groups_on_each_device(tmp_path) -> None:
    folder = saved(tmp_path / "m", ALIGNED)
    found = check(folder, "vllm", type="int4", tensor_parallel=2)
    assert faults(found) == [(0, "mlp"), (1, "attention"), (2, "mlp")]  # 48, 16 and 16 on each device
    assert check(folder, "vllm", type="int4").valid and check(folder, "vllm", type="f16", tensor_parallel=2).valid


@pytest.mark.parametrize(
    ("family", "overrides", "target", "found"),
    [
        ("gemma2", {}, "llama.cpp", "gemma2"),
        ("opt", {"ffn_dim": 96}, "llama.cpp", "opt"),
        ("mixtral", {}, "edge", "mixtral"),
        ("qwen3", {}, "llama.cpp", "them in k, o, q, v"),
        ("mistral", {"hidden_act": "gelu"}, "llama.cpp", "gelu"),
    ],
)
def test_models_that_a_target_cannot_take_are_told_what_can(tmp_path, family, overrides, target, found) -> None:
    overrides = overrides if family in (*MIXTURES, "opt") else {"intermediate_size": 96} | overrides
    first = check(saved(tmp_path / "m", family=family, **overrides), target).findings[0]
    assert first.fault and first.layer is None and first.found == found
    assert first.remedy.startswith("use target transformers")


def test_layers_that_differ_where_one_size_is_needed(tmp_path) -> None:
    options = {"attention_bias": False, "head_dim": 16}
    folder = saved(tmp_path / "m", [(4, 96), (2, 64), (4, 32)], "qwen3", tie_word_embeddings=False, **options)
    found = check(folder, "llama.cpp")
    assert faults(found) == [(None, "model")] and found.findings[0].found == "layers of different sizes"
    assert "--uniform" in found.findings[0].remedy
    assert check(saved(tmp_path / "n", [(2, 64)] * 3, "qwen3", tie_word_embeddings=False, **options), "llama.cpp").valid
    assert check(saved(tmp_path / "t", ALIGNED, "qwen3", tie_word_embeddings=True, **options), "llama.cpp").valid


@pytest.mark.parametrize("target", ["vllm", "gpu"])
def test_experts_must_be_alike_where_heads_need_not(tmp_path, target: str) -> None:
    for name, widths in (("alike", (128, 128, 128)), ("other", (128, 128, 256))):
        model = tiny_model("mixtral", torch.float32, intermediate_size=256, num_key_value_heads=8)
        units = discover(model)
        experts = [tuple(e * 256 + channel for e in range(4) for channel in range(width)) for width in widths]
        layers = tuple(LayerPlan(tuple(range(8 // (i % 2 + 1))), channels) for i, channels in enumerate(experts))
        saap.save(saap.compact(model, Plan(units, layers)), tmp_path / name)
        rows = [(1, "attention")] if target == "gpu" else []  # of 4 heads of 8
        assert faults(check(tmp_path / name, target)) == ([(None, "model")] if name == "other" else []) + rows


def test_what_runs_at_a_cost_is_said_and_valid(tmp_path) -> None:
    model = wide_model("llama", intermediate_size=512)
    saap.save(model, tmp_path / "m")
    found = check(tmp_path / "m", "edge")
    assert found.valid and [(each.layer, each.fault) for each in found.findings] == [
        (None, False), (0, False), (1, False), (2, False),
    ]  # fmt: skip  # 64 and 128 in a row are no whole block of 256
    assert not check(tmp_path / "m", "edge", type="q4_k").valid and check(tmp_path / "m", "edge", type="q4_0").valid
    sliding = saved(tmp_path / "s", family="mistral", intermediate_size=96, sliding_window=16)
    notes = check(sliding, "llama.cpp")
    assert notes.valid and notes.findings[0].remedy == "serve at most 16 tokens"


def test_how_to_serve_it_there(tmp_path) -> None:
    folder = saved(tmp_path / "m", ALIGNED)
    assert check(folder, "transformers").command == f"saap serve {folder}"
    assert check(folder, "llama.cpp").command == (
        f"saap export {folder} --gguf m.gguf --type q8_0 && llama-server -m m.gguf"
    )
    assert check(folder, "edge", type="int8").command == (
        f"saap export {folder} --quantised int8 --out m-int8 && saap serve m-int8"
    )
    assert "--compressed-tensors int4 --out m-int4 && vllm serve m-int4" in check(folder, "vllm", type="int4").command
    assert any(need.startswith("vllm >= 0.28") for need in check(folder, "vllm").needs)
    needs = check(folder, "transformers").needs
    assert needs[0].startswith("transformers >= 5.15 (here: 5.") and needs[1].startswith("saap beside it")
    assert len(check(saved(tmp_path / "dense"), "transformers").needs) == 1  # a stock model
    spaced = saved(tmp_path / "a b", ALIGNED)
    assert check(spaced, "vllm").command == f"vllm serve '{spaced}'"


def message(*arguments: object) -> str:
    stderr = run("check", *arguments, code=2).stderr
    assert "Traceback" not in stderr
    return " ".join(stderr.split())


def rewritten(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_damaged_directories_are_errors_not_findings(tmp_path) -> None:
    assert "found none at absent" in message("./absent", "--for", "vllm")
    folder = saved(tmp_path / "m", ALIGNED)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "is not a complete safetensors file" in message(folder)
    weights.write_bytes(whole)
    rewritten(folder, lambda tensors: tensors.pop("model.layers.2.self_attn.o_proj.weight"))
    told = "expected model.layers.2.self_attn.o_proj.weight of shape [64, 64], found none"
    assert told in message(folder, "--for", "llama.cpp")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../m/model.safetensors"}}))
    assert "'../m/model.safetensors'" in message(folder)


def test_files_without_the_name_of_their_head_s_body_are_complete(tmp_path) -> None:
    """As older checkpoints of base models have them."""
    folder = saved(tmp_path / "m")
    tensors = {name.removeprefix("model."): each for name, each in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert check(folder, "vllm").valid


def test_the_command_says_yes_no_or_error_by_its_exit_code(tmp_path) -> None:
    good, bad = saved(tmp_path / "good", ALIGNED), saved(tmp_path / "bad", [(4, 97)] * 3)
    told = run("check", good, "--for", "llama.cpp").stdout
    assert "llama.cpp: valid" in told and "serve: saap export" in told and "needs: gguf >= 0.19" in told
    told = run("check", bad, "--for", "llama.cpp", code=1).stdout
    assert "llama.cpp: not valid, 3 findings" in told and "0-2" in told and "97 channels" in told
    body = json.loads(run("check", bad, "--for", "llama.cpp", "--json", code=1).stdout)
    assert body["valid"] is False and [each["layer"] for each in body["findings"]] == [0, 1, 2]
    assert "target must be one of" in message(good, "--for", "tpu")
    assert "tensor_parallel must be a positive number of devices; got 0" in message(good, "--tensor-parallel", 0)
    assert "expected --for beside it" in message(good, "--type", "q8_0")
    told = run("check", good, "--for", "llama.cpp", "--type", "q4_k", code=1).stdout
    assert "another --type" in " ".join(told.split()).replace("│ ", "")


def test_without_a_target_all_are_listed(tmp_path) -> None:
    folder = saved(tmp_path / "m", [(4, 96), (3, 97), (2, 64)])
    told = run("check", folder).stdout
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in told.splitlines() if line.startswith("│")]
    verdicts = {name: verdict for name, verdict in cells if name}
    assert verdicts == {"transformers": "valid", "vllm": "valid"} | dict.fromkeys(
        ("llama.cpp", "edge", "gpu"), "not valid"
    )
    assert f"serve for vllm: vllm serve {folder}" in told and "serve for edge" not in told
    found = json.loads(run("check", folder, "--json").stdout)
    assert [each["target"] for each in found] == list(TARGETS)
    assert [each["valid"] for each in found] == [each.valid for each in check_all(folder)]


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "default", "partial_rotary_factor": 0.5}]
)
def test_rotary_embeddings_that_llama_cpp_does_not_get_are_a_fault(tmp_path, rope) -> None:
    folder = saved(tmp_path / "m", ALIGNED, rope_parameters=rope | {"rope_theta": 1e4})
    found = check(folder, "llama.cpp")
    assert not found.valid and "rotary embeddings" in str(found) and check(folder, "vllm").valid
