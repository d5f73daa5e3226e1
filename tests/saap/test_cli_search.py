"""The command line's search options: resources, latency tables, empty modules, steps and compensation."""

import json

import pytest

import saap
from saap.latency import device_name
from tests.saap.command_line import run
from tests.saap.test_cli import CALIBRATION, prune, workplace  # noqa: F401  the fixture
from tests.saap.test_resources import make_table


@pytest.fixture(scope="module")
def statistics(workplace, tmp_path_factory):  # noqa: F811
    file = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    run("calibrate", workplace / "dense", "--data", workplace / "text.txt", *CALIBRATION, "--out", file)
    return file


def plan(statistics, out, *options, code: int = 0):
    return run("plan", statistics, "--ratio", 0.2, "--multiple", 8, "--out", out, *options, code=code)


@pytest.mark.parametrize(
    ("options", "resource"),
    [
        (("--resource", "macs", "--context", 100), saap.resources.Macs(100)),
        (("--resource", "bytes", "--context", 100), saap.resources.Bytes(context=100)),
        (("--method", "standardised"), saap.resources.Parameters()),
        (("--method", "fluctuation", "--fluctuation-weight", -0.5), saap.resources.Parameters()),
        (("--allow-empty",), saap.resources.Parameters()),
    ],
)
def test_plans_by_every_option_save_what_was_asked(statistics, tmp_path, options: tuple, resource) -> None:
    plan(statistics, tmp_path / "plan.json", *options)
    made = saap.Plan.load(tmp_path / "plan.json")
    again = saap.search(
        saap.score(saap.Statistics.load(statistics)), 0.2, resource=resource, multiple=8,
        method=options[1] if "--method" in options else "global", fluctuation_weight=-0.5,
        allow_empty="--allow-empty" in options,
    )  # fmt: skip
    assert made.layers == again.layers


def test_a_latency_table_is_of_this_machine_unless_said_otherwise(statistics, tmp_path) -> None:
    units = saap.Statistics.load(statistics).units
    for name, device in (("mine", device_name()), ("other", "another device")):
        make_table(units, device=device).save(tmp_path / f"{name}.json")
    options = ("--resource", "latency", "--latency-table")
    plan(statistics, tmp_path / "a.json", *options, tmp_path / "mine.json")
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["resource"] == "latency"
    refused = plan(statistics, tmp_path / "b.json", *options, tmp_path / "other.json", code=2)
    assert "measured on 'another device', expected" in refused.stderr.replace("\n", " ")
    plan(statistics, tmp_path / "b.json", *options, tmp_path / "other.json", "--latency-device", "another device")
    plan(statistics, tmp_path / "c.json", *options, tmp_path / "other.json", "--latency-device", "any")


def test_models_for_devices_say_for_how_many(workplace, statistics, tmp_path) -> None:  # noqa: F811
    plan(statistics, tmp_path / "plan.json", "--tensor-parallel", 4)
    made = saap.Plan.load(tmp_path / "plan.json")
    again = saap.search(saap.score(saap.Statistics.load(statistics)), 0.2, multiple=8, tensor_parallel=4)
    assert made == again and made.settings["tensor_parallel"] == 4 and {layer.width % 4 for layer in made.layers} == {0}
    options = ("--tensor-parallel", 2, "--steps", 2)
    prune(workplace, "--ratio", 0.3, *options, "--out", tmp_path / "out")
    assert saap.Plan.load(tmp_path / "out/saap_plan.json").settings["tensor_parallel"] == 2
    told = run("info", tmp_path / "out").stdout.replace("\n", " ")
    assert "tensor parallel: 1, 2" in told and "tensor parallel 2" in told  # what it allows, what was asked for
    dry = prune(workplace, "--ratio", 0.3, "--tensor-parallel", 5, "--dry-run", "--out", tmp_path / "dry", code=2)
    assert "tensor_parallel=5 cannot split 4 KV heads" in dry.stderr.replace("\n", " ")


def test_a_table_of_another_dtype_than_the_model_is_said_before_any_work(workplace, tmp_path) -> None:  # noqa: F811
    units = saap.discover(saap.load(workplace / "dense"))
    make_table(units, device=device_name(), dtype="float16").save(tmp_path / "table.json")
    options = ("--resource", "latency", "--latency-table", tmp_path / "table.json", "--out", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        with pytest.warns(UserWarning, match="measured in float16, the model is in float32"):
            prune(workplace, "--ratio", 0.2, *options, *more, "--force")


def test_steps_and_compensation_prune_to_the_ratio(workplace, tmp_path) -> None:  # noqa: F811
    prune(workplace, "--ratio", 0.3, "--steps", 2, "--compensate", "least_squares", "--out", tmp_path / "out")
    made = saap.Plan.load(tmp_path / "out/saap_plan.json")
    assert made.ratio >= 0.3 and made.settings["steps"] == 2 and made.settings["compensate"] == "least_squares"
    saap.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resource", "latency"), "--resource latency and --latency-table go together"),
        (("--latency-table", "x.json"), "--resource latency and --latency-table go together"),
        (("--latency-device", "any"), "--latency-device says of which device a --latency-table must be"),
        (("--resource", "macs", "--context", -5), "context must not be negative; got -5"),
        (("--tensor-parallel", 0), "tensor_parallel must be a positive number of devices; got 0"),
        (("--tensor-parallel", 5), "layer 0: tensor_parallel=5 cannot split 4 KV heads with 2 query heads each"),
        (
            ("--tensor-parallel", 2, "--protect", -1),
            "layer 2: tensor_parallel=2 cannot split 97 channels of a protected",
        ),
        (("--context", 5), "--context is for --resource macs or bytes; got parameters"),
        (("--method", "fluctuation", "--criterion", "magnitude"), "needs a criterion with an importance per sequence"),
    ],
)
def test_options_that_do_not_fit_are_refused(statistics, tmp_path, options: tuple, message: str) -> None:
    result = plan(statistics, tmp_path / "plan.json", *options, code=2)
    assert message in result.stderr.replace("\n", " ") and not (tmp_path / "plan.json").exists()


def test_steps_are_refused_without_text_before_the_model_is_loaded(statistics, tmp_path) -> None:
    given = ("prune", tmp_path / "no model", "--ratio", 0.2, "--out", tmp_path / "out", "--statistics", statistics)
    result = run(*given, "--steps", 2, code=2)
    assert "--steps calibrates anew after every step: it needs --data" in result.stderr.replace("\n", " ")
    assert "steps must be a positive integer; got 0" in run(*given, "--steps", 0, code=2).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plan", "p.json", "--statistics", "s"), "a --plan needs no statistics"),
        (
            ("--plan", "p.json", "--protect", "0", "--multiple", 8, "--criterion", "element"),
            "expected no --criterion, --multiple, --protect beside it",
        ),
        (("--plan", "p.json", "--keep-experts", 2), "expected no --keep-experts beside it"),
        (("--plan", "p.json", "--tensor-parallel", 2), "expected no --tensor-parallel beside it"),
        (("--plan", "p.json", "--compensated-scores", "off"), "expected no --compensated-scores beside it"),
        (("--ratio", 0.2, "--data", "x.txt", "--compensated-scores", "on"), "expected compensate 'least_squares', got"),
        (("--ratio", 0.2, "--statistics", "s", "--save-statistics", "t"), "--save-statistics keeps what is measured"),
        (("--ratio", "0.12341,0.12342", "--data", "x.txt"), "ratios of a sweep must differ in four decimals"),
        (("--ratio", 0.2, "--data", "x.txt", "--method", "fluctuation", "--criterion", "flap"), "flap has none"),
        (
            ("--ratio", 0.2, "--data", "x.txt", "--method", "fluctuation", "--baselines", "random", "--eval", "x.txt"),
            "random has none",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(tmp_path, options: tuple, message: str) -> None:
    result = run("prune", tmp_path / "no model", "--out", tmp_path / "out", *options, code=2)
    assert message in result.stderr.replace("\n", " ")


def test_baselines_go_through_the_same_pipeline(workplace, tmp_path) -> None:  # noqa: F811
    given = ("--eval", workplace / "text.txt", "--baselines", "saap", "--steps", 2, "--compensate", "least_squares")
    result = prune(workplace, "--ratio", 0.3, "--out", tmp_path / "out", *given, "--json")
    (row,) = json.loads(result.stdout)["outputs"]
    assert row["baselines"]["saap"]["perplexity"] == pytest.approx(row["evaluation"]["perplexity"], rel=1e-6)
