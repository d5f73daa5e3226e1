"""The benchmark of recovery: its arithmetic, what it asks of trainings, kept cells, and the page's tables."""

import argparse
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import saap
from benchmarks import recovery, recovery_table
from benchmarks.common import Row
from benchmarks.recovery_cases import (
    ASKED,
    BYTES,
    CASES,
    GROUPS,
    GROUPWISE,
    LORA,
    LORA_NEXT,
    ONE_EPOCH,
    RECOVERED,
    TUNING,
)
from benchmarks.recovery_cells import Cell, check_settings, read_cells, rows_of, said
from saap.recovery.settings import Settings
from tests.saap.tiny import tiny_model


def cell(case: str, perplexity: float, ratio: float = 0.5, seed: int = 0, share: float = 1.0, pruned=20.0) -> Cell:
    settings = said({each.name: each.settings for each in CASES}[case])
    return Cell("m", "report", case, ratio, seed, perplexity, pruned, 10.0, share, 1000, 1.0, settings)


def rows_by_case(cells: list[Cell]) -> dict[str, Row]:
    return {row.case.partition("blocks: ")[2]: row for row in rows_of(cells)}


def test_the_share_recovered_is_of_log_perplexity() -> None:
    assert cell(LORA, 20.0).recovered == 0 and cell(LORA, 10.0).recovered == pytest.approx(1)
    assert cell(LORA, math.sqrt(200)).recovered == pytest.approx(0.5)
    assert cell(LORA, 40.0).recovered == pytest.approx(-1)


def test_rows_compare_the_seeds_that_both_cases_have() -> None:
    cells = [cell(LORA, 12.0), cell(LORA, 13.0, seed=1), cell(GROUPWISE, 12.3, share=0.3125)]
    rows = rows_by_case(cells)
    assert rows[f"{GROUPWISE} / {LORA}"].ratio == pytest.approx(12.3 / 12) and not rows[f"{GROUPWISE} / {LORA}"].missed
    assert rows[f"{LORA} / dense"].ours == pytest.approx(math.sqrt(12 * 13))
    assert rows[f"{GROUPWISE}, bytes of Linears / 16-bit"].ours == 0.3125
    assert f"{LORA} / {LORA_NEXT}" not in rows  # not measured
    worse = rows_by_case([cell(LORA, 12.0), cell(GROUPWISE, 12.4, share=0.33)])
    assert worse[f"{GROUPWISE} / {LORA}"].missed and worse[f"{GROUPWISE}, bytes of Linears / 16-bit"].missed


def test_the_share_is_asked_at_50_per_cent() -> None:
    half, fifth = (
        rows_by_case([cell(GROUPWISE, 14.0, ratio)])[f"{GROUPWISE}, of the lost log-perplexity"] for ratio in (0.5, 0.2)
    )
    assert half.asked == ">= 0.6" and half.missed and not fifth.asked  # log(20 / 14) / log 2 = 0.515
    assert not rows_by_case([cell(GROUPWISE, 13.0)])[f"{GROUPWISE}, of the lost log-perplexity"].missed  # 0.621


def test_all_cases_but_those_of_one_epoch_train_on_the_same_tokens_and_what_is_asked_are_cases() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) and {case.group for case in CASES} == set(GROUPS)
    assert {name for asked in ASKED for name in (asked.ours, asked.peer)} | {name for name, _ in RECOVERED} <= set(
        names
    )
    for case in (case for case in CASES if case.settings is not None):
        epochs = {"epochs": 1.0} if case.name.endswith(ONE_EPOCH) else {}
        assert (TUNING | epochs).items() <= case.settings.to_dict().items()
    assert BYTES == "<= 0.32"
    shared = [case for case in CASES if case.settings == CASES[0].settings]
    assert [case.then for case in shared] == ["", "nearest", "clip", "gptq"]  # LoRA, and what is made of it


@pytest.fixture
def trained(monkeypatch) -> list[Settings]:
    """Trainings and texts that cost nothing; what is asked of them is recorded."""
    asked: list[Settings] = []
    pruned = tiny_model("llama", torch.float32, intermediate_size=96, hidden_size=64)

    def prepare(name: str, text: str, ratio: float, seed: int, calibration: dict, tokens: int) -> recovery.Ground:
        return recovery.Ground(name, text, ratio, seed, pruned, pruned, None, None, tokens, (20.0, 10.0))

    def recovered(ground: recovery.Ground, settings: Settings):
        asked.append(settings)
        return pruned, 1000

    monkeypatch.setattr(recovery, "prepare", prepare)
    monkeypatch.setattr(recovery, "recovered", recovered)
    monkeypatch.setattr(recovery, "store", lambda model, then, ground: model)
    monkeypatch.setattr(recovery, "perplexity", lambda model, _, ids, seq_len: 12.0)
    return asked


def run(*options: str) -> list[Row]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    recovery.options(parser)
    (task,) = recovery.tasks(parser.parse_args(options))
    return list(task.measure())


def test_cases_of_equal_settings_share_a_training_and_kept_cells_need_none(tmp_path, trained) -> None:
    file = tmp_path / "cells.json"
    run("--match", LORA, "--ratios", "0.5", "--seeds", "0,3", "--cells", str(file))
    before = read_cells(file)
    assert [(each.objective, each.seed) for each in trained] == [
        ("distillation", 0), ("next_token", 0), ("distillation", 3), ("next_token", 3),
    ]  # fmt: skip
    assert len(before) == 16 and len({each.key for each in before}) == 16
    trained.clear()
    marked = json.loads(file.read_text())
    marked[0]["perplexity"] = 19.0  # a cell measured anew would lose it
    file.write_text(json.dumps(marked))
    rows = run("--match", LORA, "--ratios", "0.5", "--cells", str(file))
    assert not trained and rows[0].ours == pytest.approx(19.0)
    run("--match", GROUPWISE, "--ratios", "0.5", "--cells", str(file))
    assert [each.method for each in trained] == ["groupwise", "groupwise"] and len(read_cells(file)) == 19


def test_kept_cells_of_other_settings_or_text_are_refused(tmp_path, trained, monkeypatch) -> None:
    file = tmp_path / "cells.json"
    run("--match", GROUPWISE, "--ratios", "0.5", "--cells", str(file))
    kept = read_cells(file)
    other = [replace(each, settings={**each.settings, "epochs": 1.0, "rank": 4}) for each in kept]
    with pytest.raises(ValueError, match="group-wise int4: the cells kept were measured with other epochs, rank"):
        check_settings(other, CASES)
    file.write_text(json.dumps([vars(replace(each, dense=10.1)) for each in kept]))
    with pytest.raises(ValueError, match="the dense perplexity is 10.1000, here it is 10.0000"):
        run("--match", LORA, "--ratios", "0.5", "--cells", str(file))
    file.write_text('[{"model": "m"}]')
    with pytest.raises(ValueError, match="expected a list of cells as benchmarks.recovery writes them"):
        run("--cells", str(file))


def test_other_settings_have_other_names_and_are_trained_with(tmp_path, trained) -> None:
    file = tmp_path / "cells.json"
    options = ["--match", GROUPWISE, "--ratios", "0.5", "--cells", str(file)]
    run(*options, "--set", "learning_rate=0.02", "rank=32")
    assert {(each.learning_rate, each.rank) for each in trained} == {(0.02, 32)}
    assert all(each.case.endswith(", learning_rate=0.02, rank=32") for each in read_cells(file))
    trained.clear()
    run("--match", f"^{GROUPWISE}$", *options[2:])
    assert [(each.rank, each.objective) for each in trained] == [(16, "distillation")]


def test_the_teacher_comes_for_distillation_alone_and_all_text_is_trained_on(monkeypatch) -> None:
    calls: list[dict] = []

    def recover(model, tokenizer, data, **options):
        calls.append({**options, "data": data})
        return SimpleNamespace(model=model, history=SimpleNamespace(tokens=7))

    monkeypatch.setattr(saap, "recover", recover, raising=False)
    pruned = tiny_model("llama", torch.float32, intermediate_size=96)
    ground = recovery.Ground("m", "report", 0.5, 0, "dense", pruned, None, ["text"], None, (2.0, 1.0))
    distilled = Settings(objective="distillation", epochs=2.0)
    for settings in (distilled, replace(distilled, objective="next_token"), replace(distilled, levels=False)):
        model, tokens = recovery.recovered(ground, settings)
        assert tokens == 7 and model is not pruned  # the next case starts from the same pruned model
    assert [call["teacher"] for call in calls] == ["dense", None, "dense"]
    assert all(call["held_out"] == 0 and call["epochs"] == 2.0 and call["data"] == ["text"] for call in calls)
    assert [call["rank"] for call in calls] == [16, 16, 2]  # zero points of 64 inputs have two groups of 32


def test_bytes_are_those_of_16_bit_models_and_what_is_stored_in_16_bits_is_rounded() -> None:
    model = tiny_model("llama", torch.float32, intermediate_size=96)
    ground = recovery.Ground("m", "report", 0.5, 0, model, model, None, None, None, (2.0, 1.0))
    before = recovery.linear_bytes(model)
    assert before == 2 * 3 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96)  # q and o, k and v, the MLP; three layers
    halved = recovery.store(model, "float16", ground)
    weight = halved.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, weight.half().float())
    assert recovery.linear_bytes(halved) == before
    quantised = recovery.store(halved, "nearest", ground)
    # half a byte a weight, and two numbers of two bytes for each 32 weights
    assert recovery.linear_bytes(quantised) / before == pytest.approx(0.3125)


def test_the_page_keeps_its_prose_and_leaves_out_what_is_not_measured(tmp_path, monkeypatch) -> None:
    cells = [cell(LORA, 12.0), cell(LORA, 13.0, seed=1, pruned=21.0), cell(GROUPWISE, 12.5, share=0.3125)]
    (tmp_path / "cells.json").write_text(json.dumps([vars(each) for each in cells]))
    (tmp_path / "recovery.md").write_text("before\n<!-- tables -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["x", "--cells", str(tmp_path / "cells.json"), "--out", str(tmp_path)])
    recovery_table.main()
    page = (tmp_path / "recovery.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "## m: report text, dense perplexity 10.00" in page
    assert f"| {LORA} | 12.50 ± 0.71 | 69.2 ± 6.4 % | 1.000 |" in page
    assert "| pruned | 20.50 ± 0.71 | 0 | 1.000 |" in page
    assert f"| {GROUPWISE} | 12.50 | 67.8 % | 0.312 |" in page
    assert f"| 50% of blocks: {GROUPWISE} / {LORA} | <= 1.03 | 1.042 | **missed** |" in page
    assert LORA_NEXT not in page and recovery_table.TITLES["choices"] not in page


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--ratios", "1.5"], "expected shares between 0 and 1"),
        (["--groups", "mains"], "expected some of main,others,choices; got 'mains'"),
        (["--set", "ranks=3"], "expected NAME=VALUE with the name of a setting of recovery; got 'ranks=3'"),
        (["--match", "int4 ("], "expected a regular expression; got 'int4 ('"),
        (["--set", "rank"], "expected NAME=VALUE with the name of a setting of recovery; got 'rank'"),
    ],
)
def test_bad_options_are_refused(options: list[str], expected: str, capsys) -> None:
    with pytest.raises(SystemExit):
        run(*options)
    assert expected in capsys.readouterr().err


def test_no_case_of_a_name_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no case of main matches 'nonsense'"):
        run("--match", "nonsense")
