"""saap.quantise and ``saap export --quantised``: what is made, what reads it, and what is refused before any work."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

import saap
from saap.data import load_documents
from saap.model_info import model_info
from saap.opening import open_tokenizer
from saap.plan import Plan
from saap.quantised_linear import QuantisedLinear
from saap_kernels import pack
from tests.saap.command_line import run
from tests.saap.test_empty_modules import hollow
from tests.saap.tiny import DENSE, FAMILIES, tiny_model, tiny_tokenizer
from tests.serving.test_quantiser import IDS, assert_same_state, pruned, quantised_names

perplexity = import_module("saap.evaluate").perplexity  # the package's attribute of that name is the function
SMALL_MODEL = Path(__file__).parents[2] / "benchmarks/small_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pruned model with plan and tokenizer, and text."""
    path = tmp_path_factory.mktemp("quantise")
    saap.save(pruned("llama"), path / "pruned", tokenizer=tiny_tokenizer())
    letters = "the quick brown fox jumps over lazy dogs. "
    (path / "text.txt").write_text("\n\n".join(letters[i:] + letters[:i] for i in range(8)))
    return path


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_that_pack_makes(family: str, bits: int) -> None:
    model = tiny_model(family, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[tuple[int, int]] = []
    assert saap.quantise(model, bits=bits, group_size=64, progress=lambda *pair: seen.append(pair)) is model
    names = quantised_names(model)
    assert seen == [(i + 1, len(names)) for i in range(len(names))]
    for name in names:
        made, wanted = model.get_submodule(name).packed, pack(before.pop(f"{name}.weight"), bits=bits, group_size=64)
        assert torch.equal(made.data, wanted.data) and torch.equal(made.scale, wanted.scale), name
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_modules_without_anything_left_stay() -> None:
    model = hollow("opt", torch.float32)
    empty = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and 0 in m.weight.shape}
    saap.quantise(model, bits=4)
    assert empty and not empty & quantised_names(model) and torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("family", DENSE)
def test_accelerate_fuses_its_gated_mlps_and_takes_it_back(family: str) -> None:
    model = saap.quantise(pruned(family), bits=4)
    logits, state = model(IDS).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = saap.accelerate(model)
    gated = family != "opt"
    assert all(each.replaced for each in handle.report) and ("MLP" in {each.kind for each in handle.report}) is gated
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)  # fp32, other sums
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    handle.undo()
    assert torch.equal(model(IDS).logits, logits)
    with pytest.raises(ValueError, match="bits: expected None for a model that is quantised already, got 8"):
        saap.accelerate(model, bits=8)


def test_the_command_writes_what_all_that_reads_models_takes(folder, tmp_path) -> None:
    out = tmp_path / "int4"
    assert "wrote" in run("export", folder / "pruned", "--quantised", "int4", "--group-size", 64, "--out", out).stdout
    model = saap.quantise(saap.load(folder / "pruned"), bits=4, group_size=64)
    assert_same_state(saap.load(out), model)
    assert Plan.load(out / "saap_plan.json") == Plan.load(folder / "pruned/saap_plan.json")
    assert (out / "tokenizer.json").read_bytes() == (folder / "pruned/tokenizer.json").read_bytes()
    info, dense = model_info(out), model_info(folder / "pruned")
    assert (info.quantised, dense.quantised) == ("int4 in groups of 64", None)
    assert info.layers == dense.layers and info.parameters == dense.parameters
    assert info.weight_bytes < dense.weight_bytes and info.dtypes.startswith("U8")
    assert "quantised: int4 in groups of 64" in run("info", out).stdout
    text = folder / "text.txt"
    found = json.loads(run("eval", out, "--text", text, "--seq-len", 32, "--json").stdout)
    wanted = saap.evaluate(model, tiny_tokenizer(), str(text), seq_len=32)
    assert found["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-6)
    assert found["parameters"] == dense.parameters and found["weight_bytes"] < dense.weight_bytes
    compared = run("compare", folder / "pruned", out, "--text", text, "--seq-len", 32).stdout
    assert "U8" in compared and "all layers have the same sizes" in compared


def test_calibrating_pruning_and_compensating_refuse_it(folder, tmp_path) -> None:
    saap.export_quantised(folder / "pruned", tmp_path / "int8", bits=8)
    model, message = saap.load(tmp_path / "int8"), "got a model quantised by saap; use the one it was made from"
    options = {"data": IDS.repeat(4, 1), "samples": 4, "seq_len": 20}
    for work in (
        lambda: saap.discover(model),
        lambda: saap.calibrate(model, **options),
        lambda: saap.prune(model, None, ratio=0.2, **options),
        lambda: saap.quantise(model, bits=4),
        lambda: saap.compact(model, Plan.load(folder / "pruned/saap_plan.json")),
    ):
        with pytest.raises(ValueError, match=message):
            work()
    text = folder / "text.txt"
    done = run("prune", tmp_path / "int8", "--data", text, "--ratio", 0.2, "--out", tmp_path / "out", code=2)
    assert message in " ".join(done.stderr.split()) and not (tmp_path / "out").exists()
    done = run("export", tmp_path / "int8", "--quantised", "int4", "--out", tmp_path / "out", code=2)
    assert message in " ".join(done.stderr.split()) and not (tmp_path / "out").exists()


def nothing(model) -> None:
    pass


def accelerated(model) -> None:
    saap.accelerate(model, measure=False)


def not_finite(model) -> None:
    model.model.layers[2].mlp.down_proj.weight.data[3, 4] = torch.inf


def too_wide(model) -> None:
    model.model.layers[2].mlp.down_proj.weight.data[3, 4] = 3e38


def on_meta(model) -> None:
    model.model.layers[2].mlp.down_proj.to("meta")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (nothing, {"bits": 3}, "bits: expected 8 or 4, got 3"),
        (nothing, {"bits": 4, "group_size": 96}, "group_size: expected one of 32, 64, 128, got 96"),
        (nothing, {"bits": 4, "group_size": 32.0}, "group_size: expected one of 32, 64, 128, got 32.0"),
        (accelerated, {"bits": 4}, "expected a plain model, got an accelerated one"),
        (not_finite, {"bits": 4}, "found NaN or inf in model.layers.2.mlp.down_proj.weight"),
        (
            too_wide,
            {"bits": 4},
            r"layers.2.mlp.down_proj.weight: expected weights whose range fits its dtype, got .*3e\+38",
        ),
        (on_meta, {"bits": 4}, "got model.layers.2.mlp.down_proj.weight on the meta device"),
    ],
)
def test_what_cannot_be_quantised_is_refused_before_anything_changes(change, options, message: str) -> None:
    model = tiny_model("llama", torch.float32)
    change(model)
    with pytest.raises(ValueError, match=message):
        saap.quantise(model, **options)
    assert not any(isinstance(module, QuantisedLinear) for module in model.modules())
    assert getattr(model.config, "quantization_config", None) is None


def test_the_command_refuses_before_it_loads(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(import_module("saap.quantise"), "load", lambda *_: 1 / 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    for arguments, message in (
        (("--group-size", 48, "--out", tmp_path / "out"), "group_size: expected one of 32, 64, 128, got 48"),
        (("--out", tmp_path / "full"), "exists already; use force"),
    ):
        done = run("export", folder / "pruned", "--quantised", "int8", *arguments, code=2)
        assert message in " ".join(done.stderr.split())
    assert (tmp_path / "full/file").read_text() == "kept" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "worst"), [(8, 1.002), (4, 1.04)])
def test_the_trained_model_stays_what_it_was(bits: int, worst: float) -> None:
    """``python -m benchmarks.quantised`` measures 1.000 and 1.023 on other text."""
    tokenizer = open_tokenizer(str(SMALL_MODEL))
    model, documents = saap.load(SMALL_MODEL), load_documents(str(SMALL_MODEL / "selection.jsonl"))[:20]
    plain = perplexity(model, tokenizer, documents)
    assert perplexity(saap.quantise(model, bits=bits), tokenizer, documents) < worst * plain
