"""Accelerated models: the same function within rounding, the same state dict, and back again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import saap
from saap.checkpoint import load, save
from saap.compact import compact
from saap.packed_mlp import is_accelerated
from saap_kernels import pack, unpack
from tests.saap.test_checkpoint import ids, make_plan
from tests.saap.tiny import FAMILIES, MIXTURES, tiny_model

EVERYTHING = {"measure": False}
LAYERS = 3


def make(family: str, shape: str = "dense", dtype: torch.dtype = torch.float32, **options):
    model = tiny_model(family, dtype, **options)
    return model if shape == "dense" else compact(model, make_plan(model, shape))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(), use_cache=False).logits


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def assert_as_exact_as(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """``found`` misses the float64 result by twice what ``plain`` of the same dtype does, and an ulp of the largest."""
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


class Calls(TorchDispatchMode):
    """Counts calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"linear": 0, "gated_mlp": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("saap::")
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def calls_of(model) -> dict[str, int]:
    with Calls() as calls:
        logits_of(model)
    return calls.counts


def expected_calls(family: str) -> dict[str, int]:
    linears = {"phi3": 2, "opt": 6}.get(family, 4)
    return {"linear": LAYERS * linears, "gated_mlp": 0 if family in (*MIXTURES, "opt") else LAYERS}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("shape", ["dense", "uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_and_every_product_is_ours(family: str, shape: str, bits: int | None) -> None:
    """Against the plain model with the weights of the accelerated one's state dict, and the same in float64."""
    model, plain, exact = (make(family, shape, dtype) for dtype in (torch.float32, torch.float32, torch.float64))
    handle = saap.accelerate(model, bits=bits, group_size=None if bits is None else 32, **EVERYTHING)
    state = model.state_dict()
    plain.load_state_dict(state)
    exact.load_state_dict(state)
    assert_as_exact_as(logits_of(model), logits_of(plain), logits_of(exact))
    assert calls_of(model) == expected_calls(family)
    replaced = [each for each in handle.report if each.replaced]
    assert len(replaced) == sum(expected_calls(family).values())
    assert [each.kind for each in handle.report if not each.replaced] == ["experts"] * LAYERS * (family in MIXTURES)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "mixtral"])
def test_without_bits_the_state_is_the_models_and_undo_leaves_no_trace(family: str) -> None:
    model = make(family, "non-uniform")
    state, before = state_of(model), logits_of(model)
    parameters = {id(p) for p in model.parameters()}
    attributes = {name: sorted(vars(each)) for name, each in model.named_modules()}
    handle = saap.accelerate(model, **EVERYTHING)
    assert is_accelerated(model)
    assert_same_state(model.state_dict(), state)
    if family != "phi3":  # whose odd gate and up are held packed
        assert {id(p) for p in model.parameters()} == parameters
    for _ in range(2):
        handle.undo()
        assert not is_accelerated(model)
        assert {name: sorted(vars(each)) for name, each in model.named_modules()} == attributes
        assert_same_state(model.state_dict(), state)
        assert all(p.is_contiguous() for p in model.parameters())
        assert torch.equal(logits_of(model), before)
    with saap.accelerate(model, **EVERYTHING):
        assert is_accelerated(model)
    assert not is_accelerated(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_what_pack_makes_and_undo_gives_them_back(bits: int) -> None:
    model, dense = make("qwen2", "non-uniform"), state_of(make("qwen2", "non-uniform"))
    model.model.layers[1].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = saap.accelerate(model, bits=bits, group_size=32, **EVERYTHING)
    state = state_of(model)
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {n: (t.shape, t.dtype) for n, t in dense.items()}
    for name, tensor in state.items():
        packed = name.endswith("_proj.weight")
        assert torch.equal(tensor, unpack(pack(dense[name], bits=bits, group_size=32)) if packed else dense[name])
    assert len(list(model.parameters())) == len(flags) - 7 * LAYERS
    handle.undo()
    assert_same_state(model.state_dict(), state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_undo_brings_the_original_weights_back_when_they_are_kept() -> None:
    model = make("phi3", "non-uniform")
    state, parameters = state_of(model), {id(p) for p in model.parameters()}
    saap.accelerate(model, bits=4, keep_weights=True, **EVERYTHING).undo()
    assert_same_state(model.state_dict(), state)
    assert {id(p) for p in model.parameters()} == parameters


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_both_ways_to_save_write_a_plain_model(tmp_path, family: str, bits: int | None) -> None:
    model = make(family, "non-uniform")
    saap.accelerate(model, bits=bits, **EVERYTHING)
    model.save_pretrained(tmp_path / "transformers")
    save(model, tmp_path / "saap")
    for name in ("transformers", "saap"):
        found = load(tmp_path / name)
        assert_same_state(found.state_dict(), model.state_dict())
        assert not is_accelerated(found)
        torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-5, atol=1e-5)  # fp32, other sums
    sizes = saap.discover(load(tmp_path / "saap")).total_parameters
    assert sizes == saap.discover(make(family, "non-uniform")).total_parameters
    assert f"{sizes:,}" in (tmp_path / "saap/README.md").read_text() or bits is None


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_generation_with_a_static_cache(family: str, bits: int | None) -> None:
    model = make(family, "non-uniform")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    handle = saap.accelerate(model, bits=bits, **EVERYTHING)
    prompt = ids(2, 5)
    found = model.generate(prompt, cache_implementation="static", **options)
    assert torch.equal(found, model.generate(prompt, **options))
    handle.undo()
    assert torch.equal(found, model.generate(prompt, cache_implementation="static", **options))


def decode(model, forward) -> list[int]:
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        token = model(input_ids=ids(1, 5), past_key_values=cache).logits[:, -1:].argmax(-1)
        found = []
        for _ in range(4):
            token = forward(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            found.append(int(token))
    return found


def compiled(model):
    """The model under compilation without graph breaks, and what was compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def ops_of(counter: CompileCounterWithBackend) -> int:
    return sum("saap" in str(node.target) for node in counter.graphs[0].graph.nodes)


@pytest.mark.parametrize("bits", [None, 8])
def test_decoding_with_a_static_cache_compiles_to_one_graph(bits: int | None) -> None:
    model = make("llama", num_hidden_layers=1)
    saap.accelerate(model, bits=bits, **EVERYTHING)
    forward, counter = compiled(model)
    assert decode(model, forward) == decode(model, model)
    assert counter.frame_count == 1 and ops_of(counter) == 5


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", ["phi3", "opt"])  # whose own code compiles no decoding into one graph
def test_a_forward_pass_compiles_to_one_graph(family: str, bits: int | None) -> None:
    model = make(family, num_hidden_layers=1)
    saap.accelerate(model, bits=bits, **EVERYTHING)
    forward, counter = compiled(model)
    with torch.no_grad():
        assert torch.equal(forward(ids(), use_cache=False).logits, logits_of(model))
    assert counter.frame_count == 1 and ops_of(counter) == sum(expected_calls(family).values()) // LAYERS
