"""Plans for a target: every rule against the weights that are left, what is refused, and what stays as without one."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import saap
from saap import steps
from saap.families import family_of
from saap.plan import Plan
from saap.scores import Scores
from saap.search import METHODS, search
from saap.serving.check import check
from saap.serving.targets import TARGETS, constraints, size_rule
from saap.size_rules import allowed_counts
from saap.steps import Recipe, prune_in_steps
from saap.units import LayerUnits, discover
from tests.saap.test_calibrate import token_ids
from tests.saap.test_search import make_scores, make_units, removed_score
from tests.saap.test_tensor_parallel import random_scores
from tests.saap.tiny import FAMILIES, MIXTURES, tiny_model

# (family, target) that go together, and whether for all layers of one size only; written down by hand
FREE = {
    "transformers": tuple(FAMILIES),
    "vllm": ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt"),
    "llama.cpp": ("llama", "mistral", "qwen2", "qwen3"),
    "edge": ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt"),
    "gpu": ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt"),
}
UNIFORM = {"vllm": MIXTURES, "gpu": MIXTURES}
# what each asks of the columns of o and of down on each device, and whether they may be none; by hand too
COLUMNS = {"transformers": (1, 1, True), "vllm": (1, 1, False), "llama.cpp": (32, 32, False), "edge": (32, 256, False),
           "gpu": (64, 128, False)}  # fmt: skip
PAIRS = [(target, family, False) for target in FREE for family in FREE[target]]
PAIRS += [(target, family, True) for target in UNIFORM for family in UNIFORM[target]]


def wide_model(family: str, **overrides):
    """A tiny model whose widths have room for every target's multiple, with odd sizes."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8}
    if family == "opt":
        sizes = {"num_attention_heads": 16, "ffn_dim": 597, "head_dim": 4}
    elif family in MIXTURES:
        sizes |= {"moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size": 264}
    else:
        sizes |= {"intermediate_size": 597}
    if family == "qwen3":
        sizes |= {"attention_bias": False, "tie_word_embeddings": True}
    return tiny_model(family, torch.float32, **sizes | overrides)


def columns(folder, model) -> list[tuple[int, int]]:
    """Columns of o and of down (of one expert's) in every layer, as the safetensors file has them."""
    family, found = family_of(model), []
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for index in range(len(discover(model).layers)):
        prefix = f"{family.layers}.{index}."
        downs = [shape[-1] for name, shape in shapes.items() if name.startswith(prefix) and name.endswith(
            (f"{family.down}.weight", ".w2.weight", "experts.down_proj", ".down_proj.weight"))]  # fmt: skip
        assert len(set(downs)) == 1, sorted(shapes)
        found.append((shapes[f"{prefix}{family.o}.weight"][1], downs[0]))
    return found


def assert_taken(folder, model, target: str, devices: int = 1) -> None:
    heads, width, empty = COLUMNS[target]
    for in_o, in_down in columns(folder, model):
        assert in_o % (heads * devices) == 0 and in_down % (width * devices) == 0
        assert empty or (in_o and in_down)


@pytest.mark.parametrize(("target", "family", "uniform"), PAIRS)
def test_what_a_search_leaves_is_valid_there(tmp_path, target: str, family: str, uniform: bool) -> None:
    dense = wide_model(family)
    scores, whole = random_scores(discover(dense)), discover(dense).total_parameters
    with pytest.raises(ValueError, match="largest reachable ratio") as caught:
        search(scores, 0.9999, target=target, uniform=uniform)
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    for share in (0.01, 0.4, 0.75, 1.0):
        plan = search(scores, budget=(1 - share * largest) * whole, target=target, uniform=uniform)
        assert plan.ratio >= share * largest and plan.settings["target"] == target
        model = saap.compact(dense, plan, copy=True)
        saap.save(model, tmp_path / f"{share}")
        assert_taken(tmp_path / f"{share}", model, target)
        found = check(tmp_path / f"{share}", target)
        assert found.valid, found.findings
        assert Plan.load(tmp_path / f"{share}/saap_plan.json").settings["target"] == target


@pytest.mark.parametrize(("target", "family"), [("gpu", "llama"), ("vllm", "qwen2"), ("llama.cpp", "mistral")])
def test_each_device_holds_what_the_target_asks_for(tmp_path, target: str, family: str) -> None:
    dense = wide_model(family)
    plan = search(random_scores(discover(dense)), 0.4, ratio_of="blocks", target=target, tensor_parallel=2)
    model = saap.compact(dense, plan)
    saap.save(model, tmp_path / "m")
    assert_taken(tmp_path / "m", model, target, devices=2)
    assert check(tmp_path / "m", target, tensor_parallel=2).valid


@pytest.mark.parametrize("head_dim", [4, 10, 12, 16, 20, 24, 40, 64, 80, 96, 128])
@pytest.mark.parametrize(("heads", "group"), [(8, 1), (8, 4), (5, 3), (6, 7)])
@pytest.mark.parametrize("target", TARGETS)
def test_numbers_of_heads_that_may_stay(target: str, heads: int, group: int, head_dim: int) -> None:
    sizes = LayerUnits(64, heads * group, heads, head_dim, 1024, gated=True)
    needed = COLUMNS[target][0]
    for devices in (1, 2):
        expected = [
            kept for kept in range(heads, 0, -1)
            if kept * group * head_dim % (needed * devices) == 0
            and kept * group % devices == 0 and (kept % devices == 0 or kept == 1)
        ]  # fmt: skip
        assert allowed_counts(sizes, "attention", 32, size_rule(target, devices)) == expected


@pytest.mark.parametrize("width", [31, 97, 256, 300, 1024])
@pytest.mark.parametrize("target", TARGETS)
def test_widths_that_may_stay(target: str, width: int) -> None:
    units = make_units(layers=1, width=width, hidden=64)
    multiple, rule = constraints(target, units, multiple=None, tensor_parallel=1, allow_empty=False, uniform=False)
    needed = COLUMNS[target][1]
    assert multiple == max(32, needed)
    expected = [w for w in range(width, 0, -1) if w % needed == 0 and (w == width or w % multiple == 0)]
    assert allowed_counts(units.layers[0], "mlp", multiple, rule) == expected


@pytest.mark.parametrize("method", METHODS)
def test_transformers_asks_for_nothing(method: str) -> None:
    scores = random_scores(discover(tiny_model("llama")))
    plain, made = (
        search(scores, 0.3, method=method, allow_empty=True, **more) for more in ({}, {"target": "transformers"})
    )
    assert plain.layers == made.layers and made.settings == plain.settings | {"target": "transformers"}
    assert plain.settings["multiple"] == 32 and "target" not in plain.settings


@pytest.mark.parametrize("seed", range(3))
def test_the_ranking_is_the_exhaustive_optimum_where_steps_save_the_same(seed: int) -> None:
    """Heads of 16 values go in pairs for blocks of 32."""
    units = replace(
        make_units(layers=2, width=64, heads=6, hidden=64), layers=(LayerUnits(64, 6, 6, 16, 64, True),) * 2
    )
    scores = make_scores(units, seed)
    cost = units.layers[0].unit_parameters("attention")
    plan = search(scores, budget=units.total_parameters - 5 * cost, modules=("attention",), target="llama.cpp")
    lost, best = scores.attention.view(2, 6).sort(1).values, float("inf")
    for gone in itertools.product((0, 2, 4), repeat=2):
        if sum(gone) >= 5:
            best = min(best, sum(float(lost[i, :n].sum()) for i, n in enumerate(gone)))
    assert removed_score(scores, plan) == pytest.approx(best, rel=1e-12)


def test_sizes_that_a_target_refuses_shrink_first_and_count() -> None:
    units = make_units(layers=3, width=97, heads=4, hidden=64, head_dim=16)
    scores, cost = make_scores(units), units.layers[0].unit_parameters("mlp")
    plan = search(scores, budget=units.total_parameters - 3 * cost, target="llama.cpp")
    for index, layer in enumerate(plan.layers):
        best = scores.layer(index, "mlp").topk(96).indices.tolist()
        assert layer.kv_heads == (0, 1, 2, 3) and layer.channels == tuple(sorted(best))
    with pytest.raises(ValueError, match=r"^target='llama.cpp' alone removes 0\.[0-9]{4} of the model parameters: "):
        search(scores, 1.5 * cost / units.total_parameters, target="llama.cpp")
    with pytest.raises(
        ValueError, match=r"^target='gpu' with tensor_parallel=2 alone removes 0\.[0-9]{4} of the model"
    ):
        search(make_scores(make_units(layers=2, width=300, head_dim=64)), 0.01, target="gpu", tensor_parallel=2)


def test_stricter_options_are_kept() -> None:
    scores = random_scores(discover(wide_model("llama")))
    for options in ({"multiple": 64}, {"multiple": 256}, {"tensor_parallel": 2}, {"uniform": True}):
        plan = search(scores, 0.4, target="llama.cpp", **options)
        assert all(layer.width % options.get("multiple", 32) == 0 for layer in plan.layers)
        assert all(len(layer.kv_heads) % options.get("tensor_parallel", 1) == 0 for layer in plan.layers)
        assert plan.uniform or "uniform" not in options


@pytest.mark.parametrize(
    "options", [{"steps": 3}, {"steps": 2, "compensate": "least_squares", "compensated_scores": True}]
)
def test_steps_leave_what_the_target_takes_each(monkeypatch, options: dict) -> None:
    model, left = wide_model("llama"), []

    def counted(model, plan, *arguments, **more):
        left.append(plan)
        return saap.compact(model, plan, *arguments, **more)

    monkeypatch.setattr(steps, "compact", counted)
    recipe = Recipe(search={"target": "llama.cpp"}, calibration={"samples": 4, "seq_len": 12}, **options)
    done = prune_in_steps(model, None, token_ids(4), 0.6, recipe)
    assert len(left) == options["steps"] and done.plan.ratio >= 0.6
    for plan in (*left, done.plan):
        assert plan.settings["target"] == "llama.cpp"
        for layer in plan.layers:
            assert len(layer.kv_heads) in (2, 4, 6, 8) and layer.width % 32 == 0 and layer.width


def test_card_report_and_plan_say_the_target(tmp_path) -> None:
    result = saap.prune(wide_model("llama"), None, token_ids(4), ratio=0.3, samples=4, seq_len=12, target="gpu")
    saap.save(result.model, tmp_path / "m")
    saap.report(result, tmp_path / "report.html")
    assert "target gpu" in (tmp_path / "m/README.md").read_text()
    assert "Made for gpu" in (tmp_path / "report.html").read_text()
    assert result.plan.settings["multiple"] == 128 and isinstance(result.scores, Scores)
