"""Adapters on disk: back to the bit, in peft's own layout where it has one, and refused on any other base."""

import json
import os
import shutil
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import saap
from saap.checkpoint_files import PLAN_FILE
from saap.compact import PLAN_ATTRIBUTE
from saap.recovery.adapted_linear import adapted_linears, merge_adapters
from saap.recovery.attach import attach
from saap.recovery.peft_layout import ABOUT, OWN, PEFT, PEFT_CONFIG, load_adapters, save_adapters
from tests.recovery.adapted import adapted, logits, quantised, settings, stir, trained
from tests.saap.tiny import tiny_model


def saved(tmp_path, **options):
    _, model = adapted(**options)
    save_adapters(model, tmp_path / "adapters")
    return model, tmp_path / "adapters"


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family,bits,group", [("llama", 4, 32), ("qwen3", 8, 64), ("opt", 4, 128), ("gemma2", 4, 32)])
def test_what_was_saved_comes_back_to_the_bit(family, bits, group, dtype, levels, norms, tmp_path) -> None:
    model, folder = saved(
        tmp_path, family=family, bits=bits, group_size=group, dtype=dtype, levels=levels, norms=norms, rank=1
    )
    files = {ABOUT, OWN} if levels else {ABOUT, PEFT, PEFT_CONFIG}
    assert set(os.listdir(folder)) == files and len(os.listdir(tmp_path)) == 1
    other = quantised(family, bits, group, dtype)
    attached = load_adapters(other, folder)
    assert torch.equal(logits(other), logits(model))
    mine, theirs = ({n: p for n, p in each.named_parameters() if p.requires_grad} for each in (other, model))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(attached.finish()), logits(model))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_peft_runs_zero_points_beside_the_quantised_base(family, norms, tmp_path) -> None:
    model, folder = saved(tmp_path, family=family, levels=False, norms=norms, rank=2)
    base = quantised(family)
    plain, wanted = logits(base), logits(model)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    # fp32: the same sums, of which peft adds one part later and the zero points are rounded before
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert float((wanted - plain).abs().max()) > 100 * float((logits(loaded) - wanted).abs().max())


def test_ranks_that_differ_are_told_to_peft(tmp_path) -> None:
    model = quantised()
    attach(model, settings(rank=4))
    stir(model)
    for _, module in adapted_linears(
        model
    ):  # zero points alone, of rank 2 in the 2 groups of 64 inputs and 4 in those of 97
        module.lora_level_u = module.lora_level_v = None
    save_adapters(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / PEFT_CONFIG).read_text())
    assert config["r"] == 4 and set(config["rank_pattern"].values()) == {2} and config["lora_alpha"] == 16
    loaded = peft.PeftModel.from_pretrained(quantised(), tmp_path / "out")
    wanted = logits(model)
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert torch.equal(logits(load_adapters(quantised(), tmp_path / "out").model), wanted)


def test_peft_refuses_what_it_cannot_express(tmp_path) -> None:
    _, folder = saved(tmp_path)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        peft.PeftModel.from_pretrained(quantised(), str(folder))


def test_merged_adapters_are_saved_as_they_are_and_training_goes_on(tmp_path) -> None:
    model, _ = saved(tmp_path)
    merge_adapters(model)
    save_adapters(model, tmp_path / "merged")
    other = quantised()
    attached = load_adapters(other, tmp_path / "merged")
    assert torch.equal(logits(other), logits(model))
    losses = trained(other)
    assert losses[-1] < losses[0]
    wanted = logits(other)
    assert torch.equal(logits(attached.finish()), wanted)


def test_the_base_may_be_saved_loaded_and_of_another_dtype(tmp_path) -> None:
    _, folder = saved(tmp_path, dtype=torch.bfloat16)
    saap.save(quantised(dtype=torch.bfloat16), tmp_path / "base")
    base = saap.load(tmp_path / "base", dtype=torch.float32)
    assert base.dtype == torch.float32
    load_adapters(base, folder)


def pruned(seed: int):
    torch.manual_seed(seed)
    ids = torch.randint(0, 64, (4, 12))
    model = tiny_model("llama", torch.float32)
    found = saap.prune(model, None, ids, ratio=0.3, ratio_of="blocks", seq_len=12, samples=4, uniform=True).model
    return saap.quantise(found, bits=4)


def test_adapters_of_another_plan_are_refused(tmp_path) -> None:
    model, other = pruned(0), pruned(1)
    assert getattr(model, PLAN_ATTRIBUTE).layers != getattr(other, PLAN_ATTRIBUTE).layers
    attach(model, settings())
    stir(model)
    save_adapters(model, tmp_path / "out")
    load_adapters(pruned(0), tmp_path / "out")
    with pytest.raises(ValueError, match="another plan: theirs is [0-9a-f]{16}, the model's is [0-9a-f]{16}"):
        load_adapters(other, tmp_path / "out")
    saap.save(other, tmp_path / "other")
    with pytest.raises(ValueError, match="another plan: theirs is [0-9a-f]{16}, the model's is [0-9a-f]{16}"):
        load_adapters(saap.load(tmp_path / "other"), tmp_path / "out")
    (tmp_path / "other" / PLAN_FILE).unlink()
    with pytest.raises(ValueError, match="another (plan or )?base"):
        load_adapters(saap.load(tmp_path / "other"), tmp_path / "out")


BASES = [
    (lambda: quantised(group_size=64), "expected adapters of groups of 64, as the model has, got .* of 32"),
    (lambda: quantised(bits=8), r"theirs is int4 with fingerprint [0-9a-f]{16}, the model is int8 with [0-9a-f]{16}"),
    (
        lambda: saap.quantise(tiny_model("llama", torch.float32, seed=1), bits=4),
        "belong to another base: theirs is int4",
    ),
    (lambda: quantised(intermediate_size=64), "mlp.down_proj is 64x97 there and 64x64 in the model"),
    (lambda: quantised("qwen3"), "another plan or base: .* there and .* in the model"),
    (lambda: quantised(num_hidden_layers=2), "layers.2.* there and absent in the model"),
    (lambda: tiny_model("llama", torch.float32), "expected the quantised model .* got plain weights"),
    (lambda: adapted()[1], "PEFT adapters or group-wise ones"),
]


@pytest.mark.parametrize("make,message", BASES, ids=[each[1][:40] for each in BASES])
@pytest.mark.parametrize("levels", [False, True])
def test_other_bases_are_refused_and_left_alone(make, message, levels, tmp_path) -> None:
    _, folder = saved(tmp_path, levels=levels)
    model = make()
    before = {name: type(each) for name, each in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        load_adapters(model, folder)
    assert {name: type(each) for name, each in model.named_modules()} == before


def change_tensor(name, change):
    def damage(folder):
        file = next(folder / each for each in (OWN, PEFT) if (folder / each).exists())
        tensors = load_file(file)
        key = next(each for each in tensors if name in each)
        found = change(tensors.pop(key))
        save_file(tensors if found is None else tensors | {key: found.contiguous()}, file)

    return damage


def change_about(**values):
    def damage(folder):
        about = json.loads((folder / ABOUT).read_text())
        (folder / ABOUT).write_text(json.dumps(about | values))

    return damage


DAMAGES = [
    (False, change_tensor("lora_A", lambda t: t + torch.randn_like(t)), "not the same over each group of 32 inputs"),
    (False, change_tensor("lora_A", lambda t: None), "has no .*lora_A.weight, the file is damaged"),
    (False, change_tensor("lora_B", lambda t: t[1:]), r"lora_B.weight: expected shape \(.*, rank\), got"),
    (False, change_tensor("lora_B", lambda t: t[:, :1]), "expected factors of one rank, got 2 and 1"),
    (True, change_tensor(".u", lambda t: t[:, 1:]), r"\.u: expected shape \(rank, .*\), got"),
    (True, change_tensor(".v", lambda t: t * float("nan")), "expected finite values, found NaN or inf"),
    (True, change_tensor("norm", lambda t: t[1:]), r"norm.weight: expected shape \(64,\), got \(63,\)"),
    (True, change_about(norms=["model.norm"]), "expected weights of the model's norms, got others"),
    (True, change_about(format=2), "expected format 1, got 2"),
    (True, change_about(base={}), "expected a valid base.bits, the file is damaged"),
    (True, change_about(layout="x"), "expected a valid layout, the file is damaged"),
    (True, lambda folder: (folder / ABOUT).write_text("{"), "is no JSON"),
    (True, lambda folder: (folder / ABOUT).write_bytes(b"\xff\xfe"), f"{ABOUT} is no JSON"),
    (True, lambda folder: (folder / OWN).write_bytes((folder / OWN).read_bytes()[:-9]), f"{OWN}: the file is damaged"),
    (False, lambda folder: (folder / PEFT).write_bytes(b""), f"{PEFT}: the file is damaged"),
]


@pytest.mark.parametrize("levels,damage,message", DAMAGES, ids=[each[2][:40] for each in DAMAGES])
def test_damaged_files_are_refused_and_the_model_is_left_alone(levels, damage, message, tmp_path) -> None:
    _, folder = saved(tmp_path, levels=levels)
    damage(folder)
    model = quantised()
    with pytest.raises(ValueError, match=message):
        load_adapters(model, folder)
    assert not list(adapted_linears(model))


def test_missing_files_and_existing_directories_are_named(tmp_path) -> None:
    model, folder = saved(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        save_adapters(model, folder)
    save_adapters(model, folder, force=True)
    with pytest.raises(ValueError, match="found none"):
        save_adapters(quantised(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"no {ABOUT} in"):
        load_adapters(quantised(), tmp_path)
    (folder / OWN).unlink()
    with pytest.raises(FileNotFoundError, match=f"no such file: .*{OWN}"):
        load_adapters(quantised(), folder)
    shutil.rmtree(folder)
    assert not list(tmp_path.iterdir())


def test_saving_needs_no_peft(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model, folder = saved(tmp_path, levels=False)
    other = quantised()
    load_adapters(other, folder)
    assert torch.equal(logits(other), logits(model))
