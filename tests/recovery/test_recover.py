"""``saap.recover``: a tiny model end to end by every method, and what is refused before anything is changed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import saap
from tests.saap.test_checkpoint import make_plan
from tests.saap.tiny import FAMILIES, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.* held out, fewer")  # of so few sequences

SMALL = {"seq_len": 16, "batch_size": 4, "rank": 2, "alpha": 4.0, "learning_rate": 5e-3, "epochs": 3.0}


ADAPTERS = ("rank", "alpha")  # which method "full" has not


def ids(sequences: int = 24, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Runs of consecutive tokens: text that can be learned."""
    starts = torch.randint(0, 64, (sequences, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(length)) % 64


def pruned(family: str = "llama") -> Any:
    model = tiny_model(family, torch.float32)
    return saap.compact(model, make_plan(model, "non-uniform"))


def recovered(model=None, data=None, **options) -> Any:
    small = {name: value for name, value in SMALL.items() if options.get("method") != "full" or name not in ADAPTERS}
    return saap.recover(pruned() if model is None else model, None, ids() if data is None else data, **small | options)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def loss(model) -> float:
    return saap.evaluate(model, None, ids(8, seed=1), seq_len=16).loss


@pytest.mark.parametrize(
    ("method", "bits"), [("groupwise", 4), ("groupwise", 8), ("lora", None), ("lora", 4), ("full", None)]
)
def test_a_pruned_model_gets_better_and_is_saved_like_any_other(tmp_path, method: str, bits: int | None) -> None:
    model, plan, heard = pruned(), pruned().saap_plan, {"stage": [], "progress": [], "said": []}
    before = loss(model)
    found = recovered(
        model, method=method, bits=bits, held_out=0.1,
        stage=heard["stage"].append,
        progress=lambda *counts: heard["progress"].append(counts),
        said=lambda *told: heard["said"].append(told),
    )  # fmt: skip
    history = found.history
    assert loss(found.model) < before - 0.1  # of about 4 to 5 nats
    assert (found.sequences, found.held_out) == (22, 2) and found.settings.objective == "next_token"
    assert len(history.losses) == 17 and heard["progress"][-1] == (17, 17)  # three times 22 sequences, four a step
    assert [step for step, _ in heard["said"]] == list(range(1, 18))
    assert [told for _, told in heard["said"]] == pytest.approx(history.losses)
    assert heard["stage"] == (["training"] if bits is None else ["quantising", "training"])
    assert history.evaluations and history.best in {each.step for each in history.evaluations}
    assert found.model.saap_plan == plan and not found.model.training
    saap.save(found.model, tmp_path / "out")
    assert (tmp_path / "out/saap_plan.json").is_file()
    again = saap.load(tmp_path / "out")
    assert torch.equal(again(ids(2)).logits, found.model(ids(2)).logits)
    kept = bits if method == "groupwise" else None
    assert getattr(again.config, "quantization_config", None) is None if kept is None else again.is_quantized


def test_a_model_that_is_quantised_is_tuned_as_it_is() -> None:
    model = saap.quantise(pruned(), bits=8, group_size=64)
    heard: list[str] = []
    found = recovered(model, bits=8, group_size=64, stage=heard.append, epochs=1.0)
    assert heard == ["training"] and found.model.config.quantization_config.bits == 8


def test_a_teacher_is_followed_and_left_as_it_was() -> None:
    teacher = tiny_model("llama", torch.float32).train()
    before = state(teacher)
    found = recovered(pruned(), teacher=teacher, epochs=1.0)
    assert found.settings.objective == "distillation"
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_teacher_beside_the_next_token_changes_nothing() -> None:
    alone, beside = (
        recovered(teacher=teacher, objective="next_token", epochs=1.0)
        for teacher in (None, tiny_model("llama", torch.float32))
    )
    assert beside.history.losses == alone.history.losses and beside.settings == alone.settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recovered_after_its_dense_model(tmp_path, family: str, dtype: torch.dtype) -> None:
    model, teacher = tiny_model(family, dtype), tiny_model(family, dtype)
    model = saap.compact(model, make_plan(model, "non-uniform"))
    found = recovered(model, teacher=teacher, held_out=0.1, epochs=1.0, hidden=0.5, patience=None)
    assert len(found.history.losses) == 6 and found.settings.objective == "distillation"
    saap.save(found.model, tmp_path / "out")
    again = saap.load(tmp_path / "out")
    assert again.dtype == dtype and torch.equal(again(ids(2)).logits, found.model(ids(2)).logits)


def test_checkpoints_stay_in_a_folder_that_is_given(tmp_path) -> None:
    recovered(folder=tmp_path / "training", epochs=1.0)
    assert list((tmp_path / "training").iterdir())
    with pytest.raises(FileExistsError, match="holds an earlier training: go on with resume"):
        recovered(folder=tmp_path / "training", epochs=1.0)


def test_an_interrupt_says_how_to_go_on_from_a_folder(tmp_path) -> None:
    def stop(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"resume \(--resume\) goes on from checkpoint-0 in .*training$"):
        recovered(folder=tmp_path / "training", said=stop)


def test_temporary_checkpoints_stay_where_training_fails(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def spoil(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"goes on from checkpoint-3 in"):
        recovered(epochs=1.0, evaluate_every=1, said=spoil)
    (kept,) = tmp_path.glob("saap-recover-*")
    straight = recovered(epochs=1.0, evaluate_every=1)
    assert list(tmp_path.glob("saap-recover-*")) == [kept]
    with pytest.raises(ValueError, match="settings.rank: 2 -> 3"):
        recovered(epochs=1.0, evaluate_every=1, rank=3, folder=kept, resume=True, stage=pytest.fail)
    found = recovered(epochs=1.0, evaluate_every=1, folder=kept, resume=True)
    assert found.history.losses == straight.history.losses


def _wrapped(model) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def _accelerated(model) -> Any:
    saap.accelerate(model, measure=False)
    return model


def _with_nan(model) -> Any:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    return model


def _on_meta(model) -> Any:
    return model.to("meta")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (_wrapped, {}, "expected a plain model, got a PEFT-wrapped one"),
        (_accelerated, {}, "got an accelerated one"),
        (_with_nan, {}, "found NaN or inf in model.layers.0.mlp.up_proj.weight"),
        (_on_meta, {}, "on the meta device"),
        (None, {"seq_len": 65}, "seq_len: expected at most the 64 positions of the model, got 65"),
        (None, {"learn": 1}, "unknown recovery settings: learn"),
        (None, {"bits": 3}, "bits: expected 8 or 4, got 3"),
        (None, {"method": "groupwise", "bits": None}, "expected bits 8 or 4, got None"),
        (None, {"objective": "distillation"}, "expected teacher .*, got none"),
        (None, {"held_out": 1.0}, r"held_out: expected text, or a share of the sequences in \[0, 1\); got 1.0"),
        (None, {"held_out": 0.99}, "held_out: expected a share that leaves sequences to train on"),
        (None, {"held_out": ids(1, 8)}, "held-out text: .*at least one sequence of 16 tokens, found 8"),
        (None, {"data": ids(1, 15)}, "at least one sequence of 16 tokens, found 15"),
        (None, {"data": ids() + 64}, "token ids below the vocabulary size 64"),
        (None, {"tokens": 63}, "tokens: expected at least those of one step, 4 x 16 = 64, got 63"),
        (None, {"resume": True}, "expected folder, got none"),
        (None, {"rank": 65}, r"rank: expected at most \d+, the smaller side of model.layers.* got 65"),
        (None, {"rank": 3, "levels": False}, "rank: expected at most 1, the groups of 32 in a row of .* got 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_nothing_changed(spoil, options: dict, message: str) -> None:
    model = pruned() if spoil is None else spoil(pruned())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        recovered(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[n].is_meta or torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits": 4},
            "settings of int8 in groups of 64 .--bits 8 --group-size 64.*, got int4 in groups of 32",
        ),
        (
            {"bits": 8},
            "settings of int8 in groups of 64 .--bits 8 --group-size 64.*, got int8 in groups of 32",
        ),
        ({"method": "lora"}, "which method lora with bits None does not tune: give bits 8"),
        ({"method": "full"}, "which method full with bits None does not tune: give the model that it was"),
    ],
)
def test_a_quantised_model_must_be_what_the_settings_say(options: dict, message: str) -> None:
    model = saap.quantise(pruned(), bits=8, group_size=64)
    with pytest.raises(ValueError, match=message):
        recovered(model, **options)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"vocab_size": 66}, {}, "expected a teacher of the model's vocabulary of 64 tokens, got one of 66"),
        ({"max_position_embeddings": 12}, {}, "at most the 12 positions of the teacher, got 16"),
        ({"num_hidden_layers": 2}, {"hidden": 1.0}, "expected a teacher with num_hidden_layers 3, got 2"),
    ],
)
def test_a_teacher_must_fit_the_model(changes: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recovered(teacher=tiny_model("llama", torch.float32, **changes), **options)
    with pytest.raises(ValueError, match="teacher: .*found NaN or inf in model.layers.0.mlp.up_proj.weight"):
        recovered(teacher=_with_nan(tiny_model("llama", torch.float32)))
    with pytest.raises(ValueError, match="expected another model than the one to tune"):
        saap.recover(model := pruned(), None, ids(), teacher=model, **SMALL)


def test_a_tokenizer_must_be_the_models() -> None:
    model, tokenizer = pruned(), tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match="the tokenizer does not belong to this model"):
        saap.recover(model, tokenizer, ["abc " * 100], **SMALL)


def test_folders_are_refused_by_what_is_there(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; expected a directory for checkpoints"):
        recovered(folder=tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no training to go on from"):
        recovered(folder=tmp_path / "none", resume=True)


def test_saap_is_imported_without_what_training_needs() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('peft', 'accelerate'))  # importing them fails\n"
        "import saap, saap.cli\n"
        "assert 'transformers.trainer' not in sys.modules and saap.recover and saap.Recovered\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(saap.__file__).parents[1])


@pytest.mark.parametrize(("method", "name"), [("groupwise", "accelerate"), ("lora", "peft")])
def test_packages_that_are_missing_are_named(monkeypatch, method: str, name: str) -> None:
    module = sys.modules["saap.recovery.recover"]
    monkeypatch.setattr(module, "find_spec", lambda each: None if each == name else object())
    with pytest.raises(RuntimeError, match=rf"recovery by {method} needs {name}: pip install 'saap\[recover\]'"):
        recovered(method=method)
