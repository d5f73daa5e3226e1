"""The report as a reader gets it: sections, numbers, escaped text, many layers, and what happens when it fails."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import saap
from saap.evaluate import Evaluation
from saap.plan import LayerPlan, Plan
from saap.report import REPORT_FILE, describe_pruning, shown_name
from saap.report_page import amount, change, render, seconds, setting
from saap.scores import Scores
from saap.search import search
from saap.units import LayerUnits, Units
from tests.saap.command_line import run
from tests.saap.page import Page
from tests.saap.test_cli import prune, workplace  # noqa: F401  # a fixture
from tests.saap.tiny import tiny_model, tiny_tokenizer

TEXT = ["the quick brown fox jumps over lazy dogs. " * 4] * 3
OPTIONS = {"samples": 4, "seq_len": 16, "multiple": 8}
EVIL = '<script>alert("x")</script>&amp;"\'><img src=http://evil onerror=a()> \u202e\ud800 {{ 7 * 7 }}'
SECTIONS = ["In short", "Evaluation", "Generated text", "Sizes of every layer", "Importance"]
SECTIONS += ["Importance against fluctuation", "Settings"]


@pytest.fixture(scope="module")
def result() -> saap.PruneResult:
    model = tiny_model("llama", torch.float32)
    return saap.prune(model, tiny_tokenizer(), TEXT, ratio=0.2, eval_text=TEXT, **OPTIONS)


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8")).check()


def test_every_section_shows_what_the_result_holds(tmp_path, result) -> None:
    saap.report(result, tmp_path / "r.html", name="my model")
    page, found = read(tmp_path / "r.html"), result.evaluation
    assert list(page.sections) == SECTIONS and found is not None and found.against is not None
    assert f"Asked: 20.00% of the model's parameters. Removed: {result.plan.ratio:.2%} of all parameters" in page.text
    for value in (found, found.against):
        row = page.sections["Evaluation"]
        assert f"{value.parameters:,}" in row and f"{value.perplexity:,.2f}" in row
    assert found.prompt in page.sections["Generated text"] and found.sample in page.sections["Generated text"]
    for index, layer in enumerate(result.plan.layers):
        assert f"{index}4{len(layer.kv_heads)}" in page.sections["Sizes of every layer"].replace("\n", "")
    for name in ("calibrate", "score", "search", "compact", "evaluate", "vector order", "data fingerprint", "torch"):
        assert name in page.sections["Settings"]
    assert set(result.timings) == {"calibrate", "score", "search", "compact", "evaluate"}
    assert len(page.of("figure")) == 8  # two texts, and three pairs of charts


def test_no_text_from_outside_is_taken_for_markup(tmp_path, result) -> None:
    assert result.evaluation is not None
    evil = replace(result.evaluation, sample=EVIL, prompt=EVIL, device=EVIL)
    plan = replace(result.plan, settings=result.plan.settings | {EVIL: EVIL, "criterion": EVIL})
    result = replace(result, evaluation=evil, plan=plan)
    saap.report(result, tmp_path / "r.html", name=EVIL, baselines=[(EVIL, evil)])
    page = read(tmp_path / "r.html")  # check() refuses script and img elements
    shown = EVIL.replace("\ud800", "?")
    assert page.text.count(shown) >= 6 and "49" not in page.of("title")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in html and "http://evil" in page.text


def test_nothing_is_fetched(tmp_path, result) -> None:
    saap.report(result, tmp_path / "r.html", name="model")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    for reference in ("http://", "https://", "url(", "@import", "@font-face"):
        assert reference not in html


def large(layers: int, kv_heads: int = 8, **options) -> tuple[Plan, Scores]:
    sizes = LayerUnits(512, 4 * kv_heads, kv_heads, 16, 1408, True)
    block = sizes.parameters("attention") + sizes.parameters("mlp")
    units = Units("llama", (sizes,) * layers, layers * block + 10**6, layers * block, "fingerprint")
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(units.count(m), generator=generator, dtype=torch.float64).exp() for m in ("attention", "mlp")]
    scores = Scores(units, 300 * values[0], values[1], {"criterion": "mine"})
    return search(scores, 0.4, **options), scores


@pytest.mark.parametrize("kv_heads", [8, 100])
def test_eighty_layers_stay_small_and_complete(kv_heads: int) -> None:
    plan, scores = large(80, kv_heads)
    html = render(describe_pruning("model", plan, tiny_model("llama", torch.bfloat16), scores=scores))
    page = Page(html).check()
    assert len(html) < 400_000
    rows = page.sections["Sizes of every layer"]
    assert all(f"{len(layer.channels):,}" in rows for layer in plan.layers) and "79" in rows
    assert f"KV heads: {80 * kv_heads:,} in dense" in rows
    crosses = "Crosses: removed heads" in page.sections["Importance"]
    assert crosses is (kv_heads == 8)  # more heads than bins are sorted and binned like channels
    assert page.sections["Importance"].count("Left of the line: removed") == (1 if crosses else 2)
    assert "not evaluated" in page.sections["Evaluation"]
    assert "there is no fluctuation to show" in page.sections["Importance against fluctuation"]


def test_uniform_sizes_protected_layers_and_plans_without_scores() -> None:
    plan, scores = large(6, method="uniform")
    page = Page(render(describe_pruning("m", plan, tiny_model("llama", torch.float16), scores=scores))).check()
    assert "The same share in every layer" in page.text
    plan, _ = large(6, protect=[0])
    page = Page(render(describe_pruning("m", plan, tiny_model("llama", torch.float16)))).check()
    assert "Importance" not in page.sections
    assert "largest in layer 0 (1,408 of 1,408)" in page.sections["Sizes of every layer"]


def test_a_plan_that_keeps_the_least_important_draws_no_line() -> None:
    plan, scores = large(4)
    edited = replace(plan, layers=(LayerPlan((0,), tuple(range(0, 1408, 2))), *plan.layers[1:]))
    page = Page(render(describe_pruning("m", edited, tiny_model("llama", torch.float16), scores=scores))).check()
    assert "Left of the line" not in page.text and "Crosses: removed heads" in page.text


def test_sizes_without_evaluation_are_those_that_evaluation_would_measure(result) -> None:
    counted = describe_pruning("m", result.plan, result.model)
    evaluated = describe_pruning("m", result.plan, result.model, evaluation=result.evaluation)
    measured = {fact.label: fact for fact in evaluated.facts}
    assert [fact.label for fact in counted.facts] == ["Parameters", "Weights", "KV cache per token"]
    assert all(measured[fact.label] == fact for fact in counted.facts)


def test_a_report_is_plain_data(result) -> None:
    described = describe_pruning("m", result.plan, result.model, statistics=result.statistics, scores=result.scores)
    assert json.loads(json.dumps(described.to_dict()))["names"] == ["dense", "pruned"]
    assert len(described.scores[0].points) == 12


@pytest.mark.parametrize("error", [ZeroDivisionError("none"), OSError("disk full"), AttributeError("x"), KeyError("y")])
def test_a_failing_report_never_costs_the_model(workplace, tmp_path, monkeypatch, error) -> None:  # noqa: F811
    def fail(_report: object) -> str:
        raise error

    monkeypatch.setattr(sys.modules["saap.report"], "render", fail)  # the package's attribute is the function
    result = prune(workplace, "--ratio", "0.1,0.2", "--out", tmp_path / "out", "--json")
    assert f"the model is saved without its report: {type(error).__name__}" in result.stderr
    for row in json.loads(result.stdout)["outputs"]:
        assert row["report"] is None
        assert saap.discover(saap.load(row["out"])).total_parameters == row["parameters"]
    assert not list(tmp_path.rglob(REPORT_FILE))


def test_prune_writes_the_report_beside_the_weights_unless_told_not_to(workplace, tmp_path) -> None:  # noqa: F811
    evaluated = ("--eval", workplace / "text.txt", "--json")
    made = json.loads(prune(workplace, "--ratio", "0.1,0.2", "--out", tmp_path / "a", *evaluated).stdout)["outputs"]
    for row in made:
        page = read(tmp_path / "a" / row["out"].rpartition("/")[2] / REPORT_FILE)
        assert row["report"].endswith(REPORT_FILE) and list(page.sections) == SECTIONS
        assert "dense, pruned" in page.text  # the model's own name, without the folders above it
        assert "text.txt" in page.sections["Settings"] and str(workplace) not in page.text
        assert "save" in page.sections["Settings"]
    prune(workplace, "--ratio", 0.1, "--out", tmp_path / "b", "--no-report")
    assert not (tmp_path / "b" / REPORT_FILE).exists() and saap.load(tmp_path / "b")


def test_an_edited_plan_without_statistics_is_reported_too(workplace, tmp_path) -> None:  # noqa: F811
    prune(workplace, "--ratio", 0.2, "--out", tmp_path / "a")
    run("prune", workplace / "dense", "--plan", tmp_path / "a/saap_plan.json", "--out", tmp_path / "b")
    page = read(tmp_path / "b" / REPORT_FILE)
    assert "saap_plan.json" in page.text and "Importance" not in page.sections


def test_names_of_local_folders_lose_their_path(tmp_path) -> None:
    assert shown_name(str(tmp_path / "my-model")) == "my-model" == shown_name("./here/my-model")
    assert shown_name("organisation/my-model") == "organisation/my-model"
    assert shown_name("") == "unnamed model"


def test_numbers_are_written_for_people() -> None:
    space = "\N{NO-BREAK SPACE}"
    assert amount(6_738_415_616, "count") == f"6.74{space}B" and amount(999, "count") == "999"
    assert amount(3 * 2**30, "bytes") == f"3.00{space}GiB" and amount(12, "bytes") == f"12{space}B"
    assert amount(1e9, "perplexity") == "10⁹" and amount(12.345, "perplexity") == "12.35"
    assert change(80, 100) == f"−20.0{space}%" and change(300, 100) == f"×{space}3.00"
    assert change(1, 1) == "unchanged" == change(0, 0) and change(2, 0) == "new"
    assert [seconds(s) for s in (0.5, 75, 7260)] == ["0.50 s", "1 min 15 s", "2 h 1 min"]
    assert [setting(v) for v in (True, None, [], [1, 2], 0.5, 1234)] == ["yes", "none", "none", "1, 2", "0.5", "1,234"]


def test_an_infinite_speed_or_perplexity_does_not_break_the_page() -> None:
    plan, _ = large(2)
    odd = Evaluation(float("inf"), 9e9, 1, 1, 2, 1, 0, 0, 0, float("inf"), "", "float32", "cpu")
    assert "inf" in Page(render(describe_pruning("m", plan, tiny_model("llama"), evaluation=odd))).check().text


def test_baselines_stand_in_the_table_and_leave_the_pruned_model_alone(workplace, tmp_path) -> None:  # noqa: F811
    text = ("--eval", workplace / "text.txt")
    options = ("--ratio", "0.1,0.3", *text, "--json")
    plain = json.loads(prune(workplace, *options, "--out", tmp_path / "a").stdout)["outputs"]
    with_baselines = prune(workplace, *options, "--out", tmp_path / "b", "--baselines", "random,magnitude")
    for before, after in zip(plain, json.loads(with_baselines.stdout)["outputs"], strict=True):
        assert after["evaluation"]["perplexity"] == before["evaluation"]["perplexity"]
        assert list(after["baselines"]) == ["random", "magnitude"] and not before["baselines"]
        page = read(tmp_path / "b" / after["out"].rpartition("/")[2] / REPORT_FILE)
        for found in after["baselines"].values():
            assert amount(found["perplexity"], "perplexity") in page.sections["Evaluation"]
            assert found["parameters"] < before["evaluation"]["against"]["parameters"]
        assert "baselines" in page.sections["Settings"]


def test_baselines_that_cannot_be_evaluated_are_refused(workplace, tmp_path) -> None:  # noqa: F811
    for name, message in (("best", "unknown criterion 'best'; known: saap"), ("random", "--baselines needs --eval")):
        result = prune(workplace, "--ratio", 0.2, "--out", tmp_path / "o", "--baselines", name, code=2)
        assert message in result.stderr and not list(tmp_path.iterdir())
