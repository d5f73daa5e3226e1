"""``saap export --rounding``: directories of both formats, what their cards say, what is refused before any work."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import saap
from saap.data import pack
from saap.quantiser import linears_to_quantise
from saap.serving.compressed_tensors import export_compressed_tensors
from tests.saap.command_line import run
from tests.saap.tiny import tiny_tokenizer
from tests.serving.test_compressed_tensors import aligned, unequal
from tests.serving.test_quantiser import IDS, assert_same_state, pruned, quantised_names

round_linears = import_module("saap.quantise").round_linears  # the package's attribute of that name is the function
TEXT = ("--data", "text.txt", "--samples", 6, "--seq-len", 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two pruned models, the second with widths for compressed-tensors, and text."""
    path = tmp_path_factory.mktemp("rounding")
    saap.save(pruned("llama"), path / "pruned", tokenizer=tiny_tokenizer())
    saap.save(unequal("llama"), path / "unequal", tokenizer=tiny_tokenizer())
    letters = "the quick brown fox jumps over lazy dogs. "
    (path / "text.txt").write_text("\n\n".join(letters[i:] + letters[:i] for i in range(8)))
    return path


def ids_of(folder: Path) -> torch.Tensor:
    return pack(tiny_tokenizer(), folder / "text.txt", samples=6, seq_len=20)


@pytest.mark.parametrize("rounding", ["clip", "gptq"])
def test_the_command_writes_what_quantise_makes(folder, tmp_path, rounding: str, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    text = TEXT if rounding == "gptq" else ()
    run("export", "pruned", "--quantised", "int4", "--rounding", rounding, *text, "--out", tmp_path / "out")
    model = saap.load("pruned")
    saap.quantise(model, bits=4, rounding=rounding, data=ids_of(folder) if text else None)
    loaded = saap.load(tmp_path / "out")
    assert_same_state(loaded, model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    card = (tmp_path / "out/README.md").read_text()
    told = "gptq, on 6 sequences of 20 tokens of text.txt" if text else "clip"
    assert f"| rounding of weights | {told} |" in card
    described = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(described) == {"quant_method", "version", "bits", "group_size", "modules_to_not_convert"}


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: aligned("llama", torch.bfloat16), lambda: unequal("phi3")])
def test_compressed_tensors_hold_the_rounded_weights(make, tmp_path, folder) -> None:
    """transformers unpacks the very weights that the sweep went on with, and they lose less than nearest ones."""
    model = make()
    saap.save(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    options = {"data": str(folder / "text.txt"), "samples": 6, "seq_len": 20}
    seen: list[tuple[int, int]] = []
    export_compressed_tensors(
        tmp_path / "model", tmp_path / "gptq", rounding="gptq", **options, progress=lambda *p: seen.append(p)
    )
    for rounding in ("nearest", "clip"):
        export_compressed_tensors(tmp_path / "model", tmp_path / rounding, rounding=rounding)
    assert seen[-1][0] == seen[-1][1] == len(seen)
    ids, wanted, lost = ids_of(folder), model(ids_of(folder)).logits.float(), {}
    for rounding in ("nearest", "clip", "gptq"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / rounding)
        lost[rounding] = float((loaded(ids).logits.float() - wanted).square().mean())
        assert f"| rounding of weights | {rounding}" in (tmp_path / rounding / "README.md").read_text()
    assert lost["gptq"] < 0.7 * lost["nearest"] and lost["clip"] < lost["nearest"]
    plain = {n: m.weight for n, m in saap.load(tmp_path / "gptq").named_modules() if isinstance(m, torch.nn.Linear)}
    config = saap.SaapConfig(bits=4)
    round_linears(model, linears_to_quantise(model, config), config, "gptq", ids, None, symmetric=True)
    names = quantised_names(model)
    assert names
    for name in names:  # fp32 rounds scale * Q + zero and scale * (Q - 8) differently; steps are of 0.01 and more
        torch.testing.assert_close(plain[name], model.get_submodule(name).unpacked_weight(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantised", "int4", "--rounding", "gptq"), "rounding gptq needs calibration text: expected data (--data)"),
        (("--compressed-tensors", "int4", "--rounding", "gptq"), "rounding gptq needs calibration text"),
        (("--quantised", "int4", "--rounding", "clip", *TEXT), "rounding clip reads no text"),
        (("--quantised", "int4", "--data", "text.txt"), "rounding nearest reads no text"),
        (("--quantised", "int4", "--samples", 5), "--samples and --seq-len go with --rounding gptq"),
        (("--quantised", "int4", "--rounding", "clip", "--seq-len", 5), "--samples and --seq-len go with"),
        (("--gguf", "out", "--rounding", "clip"), "--rounding goes with --quantised and --compressed-tensors"),
        (("--gguf", "out", "--data", "text.txt"), "rounding nearest reads no text"),
        (("--quantised", "int4", "--rounding", "gptq", "--data", "no.txt"), "no such file: no.txt"),
        (("--compressed-tensors", "int4", "--rounding", "gptq", "--data", "a.csv"), "cannot read text from 'a.csv'"),
    ],
)
def test_bad_combinations_are_refused_before_anything_is_loaded(
    folder, arguments, message: str, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(folder)
    for module in ("saap.quantise", "saap.serving.compressed_tensors"):  # ``saap.quantise`` is the function's name too
        monkeypatch.setattr(import_module(module), "load", lambda *_: 1 / 0)
    out = () if "--gguf" in arguments else ("--out", tmp_path / "out")
    done = run("export", "unequal", *arguments, *out, code=2)
    assert message in " ".join(done.stderr.split()) and not (tmp_path / "out").exists()


def test_text_that_is_too_short_leaves_nothing_behind(folder, tmp_path) -> None:
    text = ("--data", folder / "text.txt", "--samples", 9, "--seq-len", 60)
    done = run("export", folder / "pruned", "--quantised", "int4", "--rounding", "gptq", *text, "--out",
               tmp_path / "out", code=2)  # fmt: skip
    assert "9 samples of 60 tokens need 540 tokens" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
