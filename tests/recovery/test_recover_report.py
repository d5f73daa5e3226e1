"""The report of a recovered model: its curves, its table of three models, and what stands in for what is not there."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saap.charts import EDGE, LEFT, MOST_DOTS, MOST_POINTS, TOP, WIDTH, curve
from saap.evaluate import Evaluation
from saap.plan import Plan
from saap.recovery.report import described_recovery, recovery_rows
from saap.recovery.settings import Settings
from saap.report import drawn_into
from saap.report_page import render
from saap.units import discover
from tests.saap.page import Page
from tests.saap.test_checkpoint import make_plan
from tests.saap.tiny import tiny_model

NUMBERS = re.compile(r"-?\d+\.?\d*")


def evaluation(perplexity: float, against: Evaluation | None = None, **changes: Any) -> Evaluation:
    found = Evaluation(
        perplexity, 2.0, 1000, 10, 128, 10**6, 10**6, 2 * 10**6, 512, 90.0, "text", "float32", "cpu", "It"
    )
    return replace(found, against=against, **changes)


def recovered(steps: int = 30, evaluations: int = 3, **changes: Any) -> Any:
    """What ``saap.recover`` gives, of a training that fell from 4 to 2 and rose again at its end."""
    each = max(1, steps // max(1, evaluations))
    held = [SimpleNamespace(step=(index + 1) * each, loss=3.0 - 0.5 * index) for index in range(evaluations)]
    if evaluations:
        held[-1].loss = 2.9
    best = held[-2].step if evaluations > 1 else steps
    history = SimpleNamespace(
        losses=[4.0 - 2.0 * index / max(1, steps - 1) for index in range(steps)], evaluations=held, best=best,
        stopped_early=False, planned=steps, cut_short=False, tokens=steps * 128, seconds=1.0,
    )  # fmt: skip
    settings = Settings(objective="distillation", **changes)
    return SimpleNamespace(
        model=tiny_model("llama", torch.float32),
        settings=settings,
        history=history,
        sequences=40,
        held_out=2,
        timings={"quantise": 1.0},
    )


def plan() -> Plan:
    model = tiny_model("llama", torch.float32)
    made = make_plan(model, "non-uniform")
    return Plan(discover(model), made.layers, {"criterion": "saap", "ratio": 0.3})


def page(found: Any, evaluated: Evaluation | None = None, made: Plan | None = None) -> str:
    return render(described_recovery("m-20", found, made, evaluated, {"train": 60.0}, {"training": "/x/text.jsonl"}))


THREE = evaluation(11.0, evaluation(20.0, evaluation(9.0), weight_bytes=10**6))


def test_the_page_has_curves_three_models_widths_settings_and_times() -> None:
    text = page(recovered(), THREE, plan())
    table = text[text.index('<table class="numbers">') : text.index("</table>")]
    assert re.findall(r'<th scope="row"><bdi>(\w+)</bdi>', table) == ["dense", "pruned", "recovered"]
    assert re.findall(r'<th scope="row"><bdi>\w+</bdi></th><td>([\d.]+)</td>', table) == ["9.00", "20.00", "11.00"]
    assert text.count('class="curve"') == 2 and text.count('class="ring"') == 1
    assert "Ringed: step 20, 2.5, whose parameters were taken." in text and "From 4 at step 1 to 2 at step 30." in text
    assert "KL divergence" in text and "m-20, recovered" in text
    assert "<bdi>Recovery</bdi>" in text and "text.jsonl" in text and "/x/" not in text and "1 min 0 s" in text
    assert "KV heads, <bdi>dense</bdi>" in text and "<bdi>pruned</bdi>" in text
    assert text.count("<blockquote") == 4  # what was asked, and three answers
    assert "script" not in text and "http" not in text.replace("http://www.w3.org", "")


def test_every_curve_has_a_title_a_description_and_text_beside_it() -> None:
    text = page(recovered(), THREE, plan())
    for index, title in ((1, "Training loss"), (2, "Held-out loss")):
        svg = text[text.index(f'aria-labelledby="losses-{index}-title losses-{index}-text"') :]
        assert f'<title id="losses-{index}-title">{title}</title>' in svg[:600]
        assert re.search(rf'<desc id="losses-{index}-text">\S.+</desc>', svg[:900])
    Page(text).check()


def test_what_was_not_measured_is_left_out() -> None:
    text = page(recovered(evaluations=0))
    assert text.count('class="curve"') == 1 and 'class="ring"' not in text
    assert "The models were not evaluated" in text and 'id="figures"' not in text and 'id="widths"' not in text
    Page(text).check()


@pytest.mark.parametrize(("steps", "evaluations"), [(1, 0), (1, 1), (2, 2), (100_000, 500)])
def test_curves_of_any_length_stay_inside_their_frame_and_small(steps: int, evaluations: int) -> None:
    text = page(recovered(steps, evaluations))
    assert len(text) < 60_000 and text.count('class="curve"') == 1 + bool(evaluations)
    Page(text).check()


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [5.0, 1.0, 2.0], [1e-6, 1.0, 30.0], [4.0] * 1000])
def test_points_of_a_curve_are_where_axes_say(values: list[float]) -> None:
    points = [(float(index + 1), value) for index, value in enumerate(values)]
    drawn = curve(points, len(values), "loss", ringed=1.0)
    places = [float(number) for number in NUMBERS.findall(drawn.line)]
    across, down = places[::2], places[1::2]
    assert len(across) == min(len(values), -(-len(values) // -(-len(values) // MOST_POINTS)))
    assert all(LEFT <= x <= WIDTH - EDGE for x in across) and across == sorted(across)
    assert all(TOP <= y <= TOP + drawn.frame.height for y in down)
    order = sorted(range(len(down)), key=lambda index: -down[index])  # lower on the page is less
    if len(values) <= MOST_DOTS:
        assert [values[index] for index in order] == sorted(values) and drawn.dots.count("M") == len(values)
        assert drawn.ring is not None and abs(drawn.ring[0] - across[0]) < 0.01
    else:
        assert drawn.dots == ""
    ticks = [float(label.replace(",", "")) for _, label in drawn.frame.x_ticks]
    assert ticks and all(tick.is_integer() for tick in ticks)


def test_rows_say_what_was_learned_of_what() -> None:
    rows = recovery_rows(recovered(), "my-llama")
    assert rows["recovery"] == "groupwise: zero points, levels, norms, rank 16, alpha 16, merged"
    assert rows["weights"] == "int4 in groups of 32, rounded by gptq"
    assert rows["objective"] == "distillation from my-llama over its 64 likeliest tokens"
    assert (
        rows["held-out loss"].startswith("2.5000 after step 20, the best") and "30 steps" in rows["tokens trained on"]
    )
    as_it_came = recovered()
    as_it_came.timings.clear()
    assert recovery_rows(as_it_came, None)["weights"] == "int4 in groups of 32, as it came"
    plain = recovered(method="lora", bits=None, top_k=None, hidden=0.5)
    rows = recovery_rows(plain, None)
    assert "weights" not in rows and rows["recovery"] == "LoRA, rank 16, alpha 16, merged"
    assert rows["objective"] == "distillation from the dense model over all tokens + 0.5 x hidden states"
    assert "merged into float32 weights" in recovery_rows(recovered(method="lora", bits=8), None)["weights"]


def test_rows_say_whether_training_helped() -> None:
    found = recovered()
    found.history.evaluations.insert(0, SimpleNamespace(step=0, loss=3.5))
    assert "after step 20 (3.5000 before training), the best" in recovery_rows(found, None)["held-out loss"]
    found.history.best, found.history.stopped_early = 0, True
    told = recovery_rows(found, None)["held-out loss"]
    assert told == "3.5000 before training, which no step made better: nothing learned was kept, stopped early"


def test_a_drawing_that_fails_costs_no_model(tmp_path) -> None:
    def fails() -> Any:
        raise ValueError("cannot draw")

    assert drawn_into(tmp_path, fails) == "ValueError: cannot draw" and list(tmp_path.iterdir()) == []
