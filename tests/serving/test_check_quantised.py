"""``saap check`` and ``saap info`` of directories whose weights are stored quantised, whole and damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saap.model_info import model_info
from saap.serving.check import check
from saap.stored_weight import to_stored
from saap.weight_headers import Quantisation
from saap_kernels import pack
from tests.saap.command_line import run
from tests.serving.test_check import ALIGNED, faults, message, rewritten, saved


def quantised(folder: Path, method: str = "saap", bits: int = 8, group: int = 32, left=("lm_head",)) -> Path:
    """Store the layers' Linears of a saved directory quantised, in place: ours exact, the other's shapes only."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".layers." in n and n.endswith("proj.weight") and n.split(".")[-2] not in left]:
        weight, module = tensors[name], name.removesuffix(".weight")
        if not weight.numel():
            continue
        del tensors[name]
        if method == "saap":
            packed = pack(weight, bits=bits, group_size=group)
            tensors |= {f"{module}.{kind}": each for kind, each in to_stored(packed).items()}
            continue
        rows, columns = weight.shape
        tensors[f"{module}.weight_packed"] = torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int32)
        tensors[f"{module}.weight_scale"] = torch.ones(rows, -(-columns // group))
        tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = {
        "quant_method": "saap",
        "version": 1,
        "bits": bits,
        "group_size": group,
        "modules_to_not_convert": left,
    }
    if method != "saap":
        weights = {"num_bits": bits, "group_size": group, "strategy": "group", "type": "int", "symmetric": True}
        described = {"quant_method": method, "format": "pack-quantized", "ignore": left,
                     "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
    return folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kept", [None, [(4, 96), (1, 33), (0, 0)]])
@pytest.mark.parametrize("left", [("lm_head",), ("lm_head", "o_proj")])
def test_quantised_directories_are_described_as_what_they_stand_for(tmp_path, bits: int, kept, left) -> None:
    plain = model_info(saved(tmp_path / "m", kept))
    found = model_info(quantised(tmp_path / "m", bits=bits, left=left))
    assert found.quantised == f"int{bits} in groups of 32" and plain.quantised is None
    assert (found.layers, found.parameters, found.uniform) == (plain.layers, plain.parameters, plain.uniform)
    assert found.to_dict()["quantised"] == found.quantised and "I8" in found.stored or "U8" in found.stored


def test_compressed_tensors_need_whole_groups(tmp_path) -> None:
    folder = quantised(saved(tmp_path / "m", [(4, 96), (3, 64), (4, 40)]), "compressed-tensors", bits=4)
    assert model_info(folder).quantised == "int4 in groups of 32, compressed-tensors pack-quantized"
    assert faults(check(folder, "vllm")) == [(1, "attention"), (2, "mlp")]
    ours = quantised(saved(tmp_path / "n", [(4, 96), (3, 64), (4, 40)]), bits=4)
    assert check(ours, "vllm").valid  # the last group may be shorter
    assert (2, "mlp") in faults(check(ours, "vllm", tensor_parallel=1 + 1))  # but not in the middle of a row
    assert check(ours, "transformers").command == f"saap serve {ours}"
    assert check(ours, "vllm").needs[-1] == "saap beside it"
    assert check(folder, "vllm").needs[-1].startswith("compressed-tensors (here: ")


def test_quantised_directories_are_not_for_llama_cpp(tmp_path) -> None:
    found = check(quantised(saved(tmp_path / "m", ALIGNED)), "llama.cpp")
    assert faults(found) == [(None, "weights")] and "the directory that it was made from" in found.findings[0].remedy
    assert run("info", tmp_path / "m").stdout.count("quantised: int8 in groups of 32") == 1


def test_damaged_quantised_directories_are_named_with_the_tensor(tmp_path) -> None:
    name = "model.layers.1.mlp.down_proj"
    cases = {
        "a": (lambda t: t.pop(f"{name}.qzero"), f"expected {name}.qzero of shape [64, 2], found none"),
        "b": (lambda t: t.update({f"{name}.qweight": t[f"{name}.qweight"][:, :-1].contiguous()}),
              f"expected {name}.qweight of shape [64, 64], got [64, 63]"),
        "c": (lambda t: t.update({f"{name}.qscale": t[f"{name}.qscale"][:-1].contiguous()}),
              f"expected {name}.qscale of shape [64, 2], got [63, 2]"),
    }  # fmt: skip
    for folder, (change, told) in cases.items():
        made = rewritten(quantised(saved(tmp_path / folder, ALIGNED)), change)
        assert told in message(made, "--for", "vllm")
    config = tmp_path / "a/config.json"
    body = json.loads(config.read_text())
    for change, told in (
        ({"quant_method": "gptq"}, "expected quant_method 'saap', or 'compressed-tensors' in the format"),
        ({"bits": 3}, "bits: expected 8 or 4, got 3"),
    ):
        quantisation = body["quantization_config"] | change
        config.write_text(json.dumps(body | {"quantization_config": quantisation}))
        assert told in message(tmp_path / "a", "--for", "vllm")
    config.write_text(
        json.dumps(body | {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}})
    )
    assert "quantization_config lacks or misshapes 'config_groups'" in message(tmp_path / "a", "--for", "vllm")


def test_modules_may_be_kept_by_any_end_of_their_names() -> None:
    found = Quantisation("saap", 4, 32, ("lm_head", "self_attn.q_proj", "model.layers.0.mlp.up_proj"))
    kept = ("lm_head", "model.layers.3.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    assert all(found.keeps(name) for name in kept)
    assert not any(found.keeps(name) for name in ("model.layers.1.mlp.up_proj", "model.layers.0.other_attn.q_proj"))
