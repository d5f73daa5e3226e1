"""What the card of a recovered model says of its recovery goes along when it is exported."""

from pathlib import Path

import pytest
import torch

import saap
from saap.card import Made, recovery_in
from tests.recovery.test_cli_recover import recover, workplace  # noqa: F401
from tests.saap.command_line import run
from tests.saap.test_card import card
from tests.saap.tiny import tiny_model, tiny_tokenizer


def making(folder: Path) -> list[str]:
    """Lines of the table that says how a model was made."""
    section = card(folder).text.partition("## How it was made")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ") and line != "| | |"]


@pytest.fixture(scope="module")
def lora(workplace, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("lora") / "out"
    recover(workplace, "--out", folder, "--method", "lora", "--epochs", 0.3, "--teacher", workplace / "dense")
    return folder


def test_an_export_keeps_the_rows_of_the_recovery(lora, tmp_path) -> None:
    run("export", lora, "--quantised", "int4", "--out", tmp_path / "int4")
    before, after = making(lora), making(tmp_path / "int4")
    assert after == [*before[:-2], "| rounding of weights | nearest |", *before[-2:]]
    names = {line.split(" | ")[0] for line in after}
    assert {"| tuned on", "| recovery", "| training text", "| tokens trained on", "| objective"} <= names
    text = card(tmp_path / "int4").text
    assert "# Recovered out" in text and "and what is left was tuned on text" in text and "Measured" not in text


def test_an_export_for_other_runtimes_keeps_them_too(tmp_path) -> None:
    pytest.importorskip("compressed_tensors", reason="an extra")
    made = Made(base="b", data="text.txt", recovery=(("recovery", "LoRA"), ("objective", "next token")))
    saap.save(tiny_model("llama", torch.float32, intermediate_size=96), tmp_path / "m", made=made)
    run("export", tmp_path / "m", "--compressed-tensors", "int4", "--out", tmp_path / "int4")
    assert recovery_in(tmp_path / "int4") == {"data": made.data, "recovery": made.recovery}
    assert "| rounding of weights | nearest |" in (tmp_path / "int4/README.md").read_text()


def test_other_cards_have_no_recovery(workplace, tmp_path) -> None:  # noqa: F811
    assert recovery_in(workplace / "pruned") == recovery_in(tmp_path / "none") == {}
    saap.save(tiny_model("llama"), tmp_path / "m", tokenizer=tiny_tokenizer())
    (tmp_path / "m/README.md").write_text(
        "# Mine\n\n| recovery | of another section |\n\n## How it was made\n\nBy me.\n"
    )
    assert recovery_in(tmp_path / "m") == {}


def test_names_with_bars_come_back_as_they_are(tmp_path) -> None:
    made = Made(base="b", data="a | b.txt", recovery=(("recovery", "x | y"), ("objective", "z")), rounding="nearest")
    saap.save(tiny_model("llama"), tmp_path / "m", made=made)
    assert recovery_in(tmp_path / "m") == {"data": made.data, "recovery": made.recovery}
