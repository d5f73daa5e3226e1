"""Settings that the method, the bits or the objective of a recovery would leave unread are refused by name."""

import inspect
from dataclasses import fields

import pytest

import saap
from saap.cli.recover import recover as command
from saap.recovery.settings import Settings
from tests.recovery.test_recover import ids, pruned
from tests.saap.command_line import run
from tests.saap.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.* held out, fewer")  # of so few sequences

OF_BITS = "belongs to bits 4 and 8 of methods groupwise and lora, got method"
NO_TEACHER = "objective distillation, got objective next_token: there is no teacher (--teacher)"
CASES = [
    (("--method", "lora", "--levels"), {"method": "lora", "levels": True},
     "levels (--levels) belongs to method groupwise, got method lora"),
    (("--method", "lora", "--no-norms"), {"method": "lora", "norms": False},
     "norms (--norms) belongs to method groupwise, got method lora"),
    (("--method", "full", "--rank", 16), {"method": "full", "rank": 16},
     "rank (--rank) belongs to methods groupwise and lora, got method full"),
    (("--method", "full", "--alpha", 2), {"method": "full", "alpha": 2.0},
     "alpha (--alpha) belongs to methods groupwise and lora, got method full"),
    (("--method", "lora", "--rounding", "gptq"), {"method": "lora", "rounding": "gptq"},
     f"rounding (--rounding) {OF_BITS} lora with bits None (--bits 16)"),
    (("--method", "lora", "--bits", 16, "--group-size", 32), {"method": "lora", "bits": None, "group_size": 32},
     f"group_size (--group-size) {OF_BITS} lora with bits None (--bits 16)"),
    (("--method", "full", "--rounding", "clip"), {"method": "full", "rounding": "clip"},
     f"rounding (--rounding) {OF_BITS} full"),
    (("--top-k", 64), {"top_k": 64}, f"top_k (--top-k) belongs to {NO_TEACHER}"),
    (("--hidden", 1), {"hidden": 1.0}, f"hidden (--hidden) belongs to {NO_TEACHER}"),
    (("--next-token", 1), {"next_token": 1.0}, f"next_token (--next-token) belongs to {NO_TEACHER}"),
    (("--held-out", 0, "--patience", 3), {"held_out": 0, "patience": 3},
     "patience (--patience) belongs to trainings with held-out text (--held-out), got none"),
    (("--method", "full", "--levels", "--rank", 2), {"method": "full", "levels": True, "rank": 2},
     "levels (--levels) belongs to method groupwise, got method full; rank (--rank) belongs to methods groupwise"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "message"), CASES)
def test_what_would_be_left_unread_is_refused_before_anything_is_read(
    tmp_path, arguments: tuple, options: dict, message: str
) -> None:
    """Neither the model nor the text is there."""
    refused = run("recover", tmp_path / "no", "--data", "no.txt", "--out", tmp_path / "out", *arguments, code=2)
    assert f"error: settings that would be left unread: {message}" in refused.stderr
    model, data = object(), object()  # nobody looks at them
    with pytest.raises(ValueError) as error:
        saap.recover(model, None, data, **options)
    assert str(error.value).startswith(f"settings that would be left unread: {message}")


def test_a_teacher_that_the_objective_leaves_alone_makes_nothing_read(tmp_path) -> None:
    with pytest.raises(ValueError, match="top_k .* belongs to objective distillation, got objective next_token$"):
        saap.recover(object(), None, object(), teacher=object(), objective="next_token", top_k=8)


@pytest.mark.parametrize("method", ["groupwise", "lora", "full"])
def test_defaults_and_none_are_not_refused(method: str) -> None:
    small = {"seq_len": 16, "batch_size": 4, "tokens": 64, "held_out": 0, "patience": None, "top_k": None}
    ranks = {} if method == "full" else {"rank": 2}
    found = saap.recover(pruned(), None, ids(), method=method, **small, **ranks, next_token=0.0, hidden=0)
    assert len(found.history.losses) == 1
    again = saap.recover(pruned(), None, ids(), held_out=0, **found.settings.used() | {"patience": None})
    assert again.history.losses == found.history.losses and again.settings.rank == found.settings.rank


def test_the_rounding_of_a_model_that_is_quantised_already(tmp_path, monkeypatch) -> None:
    model = saap.quantise(tiny_model("llama"), bits=4)
    saap.save(model, tmp_path / "q")
    message = "rounding (--rounding) belongs to models of 16- or 32-bit weights, got one that is quantised"
    with pytest.raises(ValueError) as error:
        saap.recover(model, None, ids(), seq_len=16, rounding="gptq")
    assert message in str(error.value)
    monkeypatch.setattr("saap.recovery.job.open_model", lambda *_: pytest.fail("loaded"))
    options = ("--data", "no.txt", "--rounding", "gptq", "--out", tmp_path / "out")
    assert message in run("recover", tmp_path / "q", *options, code=2).stderr


def test_the_command_has_the_defaults_of_the_settings() -> None:
    """What is not on the command line is left to them."""
    given = {name: each.default for name, each in inspect.signature(command).parameters.items()}
    apart = {"bits": None}  # which follow from the method
    for each in fields(Settings):
        assert given[each.name] == apart.get(each.name, each.default), each.name
