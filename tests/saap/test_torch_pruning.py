"""Our Torch-Pruning importance against Torch-Pruning's own, on a small Llama and on OPT, which has LayerNorms."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.saap.tiny import tiny_model

tp = pytest.importorskip("torch_pruning", reason="torch-pruning is an optional extra")
from saap.adapters.torch_pruning import TaylorImportance  # noqa: E402  needs what the line above looks for

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def llama(**overrides) -> nn.Module:
    # as many KV heads as heads: Torch-Pruning 1.6 does not finish tracing grouped-query attention
    sizes = {"num_key_value_heads": 8, "num_hidden_layers": 2, "tie_word_embeddings": False}
    return tiny_model("llama", torch.float32, attn_implementation="eager", **sizes | overrides)


def groups_of(model: nn.Module) -> list:
    model.config.use_cache = False
    graph = tp.DependencyGraph().build_dependency(model, IDS, output_transform=lambda output: output.logits)
    return list(graph.get_all_groups(ignored_layers=[model.lm_head], root_module_types=[nn.Linear]))


def backward(model: nn.Module) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, list]:
    model = llama()
    return model, groups_of(model)


def assert_same_importance(model: nn.Module, groups: list, **options) -> None:
    model.zero_grad()
    backward(model)
    theirs = tp.importance.GroupTaylorImportance(**options)
    wanted = [theirs(group) for group in groups]
    model.zero_grad()
    ours = TaylorImportance(**options)
    with ours.collect(model, groups):
        backward(model)
    assert len(wanted) > 3
    for group, importance in zip(groups, wanted, strict=True):
        got = ours(group)
        # fp32 sums in another order; signed sums cancel, so errors are relative to the largest channel
        torch.testing.assert_close(got, importance, rtol=1e-4, atol=1e-5 * float(importance.abs().max()))


@pytest.mark.parametrize("options", [{}, {"multivariable": True}, {"bias": True, "group_reduction": "max"}], ids=str)
def test_importance_is_that_of_torch_pruning(traced, options) -> None:
    assert_same_importance(*traced, **options)


@pytest.mark.parametrize("multivariable", [False, True])
def test_importance_under_autocast_is_that_of_the_mixed_model(traced, multivariable: bool) -> None:
    model, groups = traced
    theirs = tp.importance.GroupTaylorImportance(multivariable=multivariable)
    ours = TaylorImportance(multivariable=multivariable)
    wanted = []
    for collecting in (False, True):
        model.zero_grad()
        with ours.collect(model, groups) if collecting else nullcontext():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
        wanted = wanted or [theirs(group) for group in groups]
    for group, importance in zip(groups, wanted, strict=True):
        # their gradients are rounded to bf16, and signed sums of them cancel
        difference = (ours(group) - importance).abs().max()
        assert difference <= (0.05 if multivariable else 0.01) * importance.abs().max()


def test_layer_norms_count_as_there() -> None:
    model = tiny_model("opt", torch.float32, attn_implementation="eager", tie_word_embeddings=False)
    assert_same_importance(model, groups_of(model), bias=True)


def test_model_is_left_as_found_and_no_linear_gets_a_gradient(traced) -> None:
    model, groups = traced
    model.zero_grad()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    importance = TaylorImportance()
    with pytest.raises(KeyError, match="stop"), importance.collect(model, groups):
        backward(model)
        raise KeyError("stop")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pruner_removes_what_it_removes_with_torch_prunings_own_importance() -> None:
    kept = []
    for importance in (tp.importance.GroupTaylorImportance(), TaylorImportance()):
        model = llama()
        model.config.use_cache = False
        layers = [layer.mlp for layer in model.model.layers]
        ignored = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
        ignored = [module for module in ignored if module not in [m for mlp in layers for m in mlp.children()]]
        ignored += [mlp.down_proj for mlp in layers]
        pruner = tp.pruner.BasePruner(
            model, IDS, importance, pruning_ratio=0.25, ignored_layers=ignored, root_module_types=[nn.Linear],
            output_transform=lambda output: output.logits,
        )  # fmt: skip
        if isinstance(importance, TaylorImportance):
            with importance.collect(model):
                backward(model)
        else:
            backward(model)
        pruner.step()
        kept.append([mlp.up_proj.weight.detach() for mlp in layers])
    for theirs, ours in zip(*kept, strict=True):
        assert theirs.shape == (72, 64) and torch.equal(theirs, ours)


def test_errors_say_what_to_do(traced) -> None:
    model, groups = traced
    importance = TaylorImportance()
    with pytest.raises(RuntimeError, match="nothing measured; run a backward pass inside collect"):
        importance(groups[0])
    with pytest.raises(RuntimeError, match="none reached"), importance.collect(model):
        pass
    with pytest.raises(RuntimeError, match="second backward"), importance.collect(model):
        backward(model)
        backward(model)


def test_tied_weights_are_refused_by_name() -> None:
    model = llama(tie_word_embeddings=True)
    model.config.use_cache = False
    graph = tp.DependencyGraph().build_dependency(model, IDS, output_transform=lambda output: output.logits)
    importance = TaylorImportance()
    with importance.collect(model):
        backward(model)
    root = model.model.layers[0].mlp.down_proj
    group = graph.get_pruning_group(root, tp.prune_linear_out_channels, list(range(64)))
    with pytest.raises(ValueError, match="lm_head.*belongs to another layer"):
        importance(group)
