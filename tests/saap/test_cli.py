"""The command line end to end on a tiny model: outputs, sweeps, JSON, dry runs and one-line errors."""

import json
from pathlib import Path

import pytest
import torch

import saap
from saap.plan import Plan
from tests.saap.command_line import run
from tests.saap.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    saap.save(tiny_model("llama", torch.float32), folder / "dense", tokenizer=tiny_tokenizer())
    letters = "the quick brown fox jumps over lazy dogs. "
    (folder / "text.txt").write_text("\n\n".join(letters[i:] + letters[:i] for i in range(40)))
    return folder


CALIBRATION = ("--samples", 4, "--seq-len", 16)


def prune(folder: Path, *arguments: object, code: int = 0):
    common = ("prune", folder / "dense", "--data", folder / "text.txt", *CALIBRATION, "--multiple", 8)
    return run(*common, *arguments, code=code)


def test_prune_saves_a_model_that_loads_and_reports_what_it_did(workplace, tmp_path) -> None:
    result = prune(workplace, "--ratio", 0.2, "--out", tmp_path / "out", "--eval", workplace / "text.txt")
    assert "removed" in result.stdout and "dense" in result.stdout
    loaded = saap.load(tmp_path / "out")
    dense = saap.discover(saap.load(workplace / "dense")).total_parameters
    assert saap.discover(loaded).total_parameters <= 0.8 * dense
    assert (tmp_path / "out/tokenizer.json").exists()


def test_pruning_twice_with_one_seed_is_byte_identical(workplace, tmp_path) -> None:
    for name in ("a", "b"):
        prune(workplace, "--ratio", 0.3, "--out", tmp_path / name, "--seed", 7)
    for file in ("model.safetensors", "saap_plan.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_sweep_from_one_calibration_prints_one_json_document(workplace, tmp_path) -> None:
    out, stats = tmp_path / "sweep", tmp_path / "s.safetensors"
    result = prune(workplace, "--ratio", "0.1,0.25", "--out", out, "--save-statistics", stats, "--json")
    rows = json.loads(result.stdout)["outputs"]
    assert [Path(row["out"]).name for row in rows] == ["ratio-0.1", "ratio-0.25"]
    assert rows[0]["parameters"] > rows[1]["parameters"] and rows[1]["removed_share"] >= 0.25
    assert stats.exists() and (out / "ratio-0.25/config.json").exists()


def test_calibrate_plan_edit_apply(workplace, tmp_path) -> None:
    stats, plan = tmp_path / "s.safetensors", tmp_path / "plan.json"
    run("calibrate", workplace / "dense", "--data", workplace / "text.txt", "--out", stats, *CALIBRATION)
    run("plan", stats, "--ratio", 0.2, "--out", plan, "--multiple", 8, "--protect=0,-1")
    body = json.loads(plan.read_text())
    assert body["layers"][0]["channels"] == "97 of 97" and body["layers"][2]["kv_heads"] == "4 of 4"
    body["layers"][1]["channels_kept"] = "0-15"
    plan.write_text(json.dumps(body))
    run("prune", workplace / "dense", "--plan", plan, "--out", tmp_path / "out")
    assert saap.discover(saap.load(tmp_path / "out")).layers[1].intermediate_size == 16
    run("prune", workplace / "dense", "--statistics", stats, "--ratio", 0.2, "--out", tmp_path / "o2", "--multiple", 8)
    assert Plan.load(tmp_path / "o2/saap_plan.json").ratio >= 0.2


def test_eval_compares_two_models(workplace, tmp_path) -> None:
    prune(workplace, "--ratio", 0.2, "--out", tmp_path / "out")
    text = ("--text", workplace / "text.txt", "--seq-len", 16)
    found = json.loads(run("eval", tmp_path / "out", *text, "--against", workplace / "dense", "--json").stdout)
    assert found["against"]["parameters"] > found["parameters"] and found["seq_len"] == 16
    assert "ppl" in run("eval", tmp_path / "out", *text).stdout


def test_dry_run_does_nothing_but_tell(workplace, tmp_path) -> None:
    result = prune(workplace, "--ratio", 0.2, "--out", tmp_path / "out", "--dry-run", "--recover-tokens", 4096)
    assert "recover tokens: 4,096\n" in result.stdout
    assert "nothing was done" in result.stdout and not (tmp_path / "out").exists()
    found = json.loads(prune(workplace, "--ratio", 0.2, "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    assert found["family"] == "llama" and found["kv_heads"] == 12
    assert f"would remove: 0.2: {found['would_remove']['0.2']:,}\n" in result.stdout
    assert found["batch_size"] >= 1 and found["checkpointing"] is False and found["activation_bytes"] > 0


def test_doctor_says_what_works_and_why_not() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["backends"]["reference"] == "ok" and found["native module"]["status"] == "ok"
    assert "measured" in found["switch points"]["cpu"]  # or not
    assert "cuda:" in run("doctor").stdout


def test_doctor_says_what_is_faster_for_a_model(tmp_path) -> None:
    saap.save(tiny_model("llama", torch.float32), tmp_path / "dense")
    found = json.loads(run("doctor", "--shapes", tmp_path / "dense", "--json").stdout)["shapes"]
    assert [(each["kind"], each["bits"]) for each in found[:3]] == [("MLP", None), ("MLP", 8), ("MLP", 4)]
    assert all(each["choice"] in ("saap", "library") and each["kernel_seconds"] > 0 for each in found)


@pytest.mark.parametrize("command", ["prune", "calibrate", "plan", "recover", "eval", "info", "compare", "doctor"])
def test_every_command_teaches(command: str) -> None:
    text = run(command, "--help").stdout
    assert "Example" in text or command == "doctor"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", 1.2), "ratio must lie strictly between 0 and 1; got 1.2"),
        (("--ratio", "a"), "--ratio: expected numbers such as 0.2 or 0.1,0.2,0.3; got 'a'"),
        (("--ratio", "0.2,0.2"), "expected different ratios in a sweep"),
        ((), "give exactly one of --ratio and --plan"),
        (("--ratio", 0.9), "largest reachable ratio"),
        (("--ratio", 0.2, "--protect", "x"), "--protect: expected layer numbers such as 0,1,-1; got 'x'"),
        (("--ratio", 0.2, "--criterion", "best"), "unknown criterion 'best'; known: saap"),
        (("--ratio", 0.2, "--batch-size", "big"), "--batch-size: expected a number or auto; got 'big'"),
        (("--ratio", 0.2, "--samples", 4000), "samples of 16 tokens need 64000 tokens, found"),
        (("--ratio", 0.2, "--eval", "absent.txt"), "no such file: absent.txt"),
        (("--ratio", 0.2, "--statistics", "absent.safetensors"), "absent.safetensors"),
        (
            ("--ratio", 0.2, "--backend", "warp"),
            "backend: expected one of reference, library, cpu, triton, cuda, got 'warp'",
        ),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(workplace, tmp_path, arguments: tuple, message: str) -> None:
    result = prune(workplace, "--out", tmp_path / "out", *arguments, code=2)
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_other_inputs_are_refused_before_work(workplace, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("")
    assert "exists already; use force" in prune(workplace, "--ratio", 0.2, "--out", tmp_path / "out", code=2).stderr
    for out in (workplace / "dense", workplace):
        lost = prune(workplace, "--ratio", 0.2, "--out", out, "--force", code=2).stderr
        assert "would be lost" in lost.replace("\n", " ")
    missing = run(
        "prune", "./absent", "--data", workplace / "text.txt", "--ratio", 0.2, "--out", tmp_path / "o", code=2
    )
    assert "no such model directory: ./absent" in missing.stderr
    saap.save(tiny_model("llama", torch.float32), tmp_path / "bare")
    bare = run(
        "prune",
        tmp_path / "bare",
        "--data",
        workplace / "text.txt",
        "--ratio",
        0.2,
        "--out",
        tmp_path / "o",
        *CALIBRATION,
        code=2,
    )
    assert "expected a tokenizer for text, got none" in bare.stderr
    assert not (tmp_path / "o").exists()


def test_statistics_of_another_model_are_refused(workplace, tmp_path) -> None:
    stats = tmp_path / "s.safetensors"
    run("calibrate", workplace / "dense", "--data", workplace / "text.txt", "--out", stats, *CALIBRATION)
    saap.save(tiny_model("llama", torch.float32, seed=9), tmp_path / "other", tokenizer=tiny_tokenizer())
    result = run("prune", tmp_path / "other", "--statistics", stats, "--ratio", 0.2, "--out", tmp_path / "o", code=2)
    assert "these statistics belong to a llama model with fingerprint" in result.stderr
