"""Run a model's MLPs and projections on the compacted-weight kernels: in place, and reversible.

transformers' hooks (``use_kernel_forward_from_hub``) do not fit: they are on norms, rotary embeddings and activations,
replace stateless forwards by class, and cannot be taken back.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.families import Family, family_of, layers_of, linears_of
from saap.kernel_choice import timing
from saap.packed_linear import HeldLinear, Packed, SharedLinear, packed_exactly
from saap.packed_mlp import GatedMLP
from saap.quantised_linear import QuantisedLinear, is_quantised
from saap.refuse import refuse_meta, refuse_nonfinite_weights, refuse_unsupported
from saap_kernels import pack
from saap_kernels.packed import FLOATS, GROUP_MULTIPLE, LINE

ATTRIBUTE = "saap_accelerated"
PACKED = "gate and up are no parameter until undo()"
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


@dataclass(frozen=True)
class Replacement:
    """One module: whether it runs our kernels, or the ``reason`` why it does not; of one that does, a remark.

    ``kind`` "Linear" with ``shape`` (N, K), "MLP", a gated one, with (F, K, D), or "experts".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    replaced: bool
    reason: str = ""


class Accelerated:
    """What ``accelerate`` did to ``model``: ``report`` says it by module, ``undo`` takes it back, as does ``with``."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.report: list[Replacement] = []

    def undo(self) -> None:
        """The model as it was: same modules and parameters, see ``accelerate`` for the values; may be called twice."""
        modules = list(self.model.modules())
        for module in modules:
            if isinstance(module, GatedMLP):
                module.restore()
        for module in modules:
            if type(module) in (SharedLinear, HeldLinear):
                module.restore()  # type: ignore[operator]  # both have it
            elif isinstance(module, QuantisedLinear):
                module.as_matrix()
        vars(self.model).pop(ATTRIBUTE, None)

    def __enter__(self) -> "Accelerated":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        counts = Counter((each.kind, each.replaced) for each in self.report)
        lines = [
            f"{kind}: {counts[kind, True]} of {counts[kind, True] + counts[kind, False]} on our kernels"
            for kind in dict.fromkeys(each.kind for each in self.report)
        ]
        reasons = Counter(each.reason for each in self.report if not each.replaced)
        return "\n".join(lines + [f"left alone, {count}: {reason}" for reason, count in reasons.items()])


@torch.inference_mode(False)
@torch.no_grad()
def accelerate(
    model: PreTrainedModel, *, bits: int | None = None, group_size: int | None = None, measure: bool | None = None,
    keep_weights: bool = False, lm_head: bool = False,
) -> Accelerated:  # fmt: skip
    """Let the decoder layers of a dense or pruned ``model`` run the kernels of ``saap_kernels``, in place.

    Gated MLPs with SiLU or tanh-approximated GELU become one op, other projections one op each; experts, empty
    modules, tied weights and anything but a plain nn.Linear stay as they are, and ``report`` says so. The state dict
    keeps names, shapes and dtypes, so that the model saves as before.

    ``bits`` None keeps every value: weights stay parameters, as views of packed storage, of which there is one copy.
    Where a gradient of a weight is wanted, the module's own forward runs. ``undo`` brings back exactly the model that
    was. Only gate and up in one Linear, of a width that is no multiple of 64, are held packed as quantised weights are.
    ``bits`` 8 or 4 quantises in groups of ``group_size`` (default 128) and drops the weights: they are no parameters
    any more, are made anew from the packed ones in the state dict and by ``undo``, and none can be loaded. With
    ``keep_weights`` ``undo`` brings back the original ones, and no memory is saved. ``lm_head``: the output head too,
    unless its weight is tied to the embedding's.

    ``measure`` replaces only what a measurement of its shape at one token finds faster (once per process and shape);
    None: on the CPU; on a GPU the ops themselves choose by measured switch points.

    Of a model that saap has quantised, gated MLPs become one op too, with the weights as they are; the other
    projections run our kernels anyway, and ``bits`` must be None.

    Logits are as far from those of exact arithmetic as the plain model's with the weights in the state dict; no bound
    holds between quantised weights and the original ones but ``pack``'s.

    Raises ValueError, with nothing changed, for other ``bits`` and groups, models of unknown families, quantised,
    PEFT-wrapped or accelerated ones, weights on the meta device, and weights to quantise that are not finite.
    """
    family = _check(model, bits, group_size, keep_weights)
    on_cpu = model.device.type == "cpu"
    work = _Work(model, family, bits, group_size, on_cpu if measure is None else measure, keep_weights)
    result = Accelerated(model)
    try:
        for index, layer in enumerate(layers_of(model, family)):
            result.report.extend(work.layer(layer, f"{family.layers}.{index}"))
        if lm_head:
            head = model.get_output_embeddings()
            result.report.append(work.linear(head, next(name for name, m in model.named_modules() if m is head)))
    except BaseException:
        result.undo()
        raise
    object.__setattr__(model, ATTRIBUTE, result)
    return result


def products_of(model: PreTrainedModel) -> Counter[tuple[str, tuple[int, ...]]]:
    """{(kind, shape): modules} of what ``accelerate`` would look at, and of the Linears inside of gated MLPs too.

    Shapes as in ``Replacement``; ``model`` may be on the meta device.
    """
    refuse_unsupported(model)
    family, found = family_of(model), Counter[tuple[str, tuple[int, ...]]]()
    for layer in layers_of(model, family):
        linears = linears_of(layer, family)
        if "gate" in linears:
            found["MLP", _mlp_shape(linears)] += 1
        found.update(("Linear", _shape(each)) for each in dict.fromkeys(linears.values()))
    return Counter({product: count for product, count in found.items() if 0 not in product[1]})


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _mlp_shape(linears: dict[str, nn.Linear]) -> tuple[int, int, int]:
    down = linears["down"]
    return down.in_features, linears["gate"].in_features, down.out_features


def _check(model: PreTrainedModel, bits: int | None, group_size: int | None, keep_weights: bool) -> Family:
    if bits not in (None, 8, 4):
        raise ValueError(f"bits: expected None, 8 or 4, got {bits!r}")
    if group_size is not None:
        if bits is None:
            raise ValueError(f"group_size: expected None unless bits is given, got {group_size!r}")
        if not isinstance(group_size, int) or group_size < 1 or group_size % GROUP_MULTIPLE:
            raise ValueError(f"group_size: expected a positive multiple of {GROUP_MULTIPLE}, got {group_size!r}")
    if keep_weights and bits is None:
        raise ValueError("keep_weights: expected False unless bits is given, got True: nothing is lost without bits")
    refuse_unsupported(model, quantised=True)
    if bits is not None and is_quantised(model):
        raise ValueError(f"bits: expected None for a model that is quantised already, got {bits!r}")
    family = family_of(model)
    refuse_meta(model)
    if bits is not None:
        refuse_nonfinite_weights(model, family)
    return family


class _Work:
    """One call of ``accelerate``."""

    def __init__(
        self, model: PreTrainedModel, family: Family, bits: int | None, group_size: int | None, measure: bool,
        keep_weights: bool,
    ) -> None:  # fmt: skip
        self.family, self.bits, self.group_size = family, bits, group_size
        self.measure, self.keep_weights = measure, keep_weights
        counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.shared = {key for key, count in counts.items() if count > 1}

    def layer(self, layer: nn.Module, prefix: str) -> Iterator[Replacement]:
        """Replace what can be in a decoder layer: its gated MLP, and the Linears outside of it or of one left alone."""
        family = self.family
        paths = list(dict.fromkeys(family.path(part) for part in family.linear_parts))
        if family.experts is not None:
            yield Replacement(f"{prefix}.{family.experts}", "experts", (), False, "experts keep transformers' products")
        elif family.gate is not None:
            found = self.gated(layer, prefix)
            yield found
            if found.replaced:
                paths = [path for path in paths if path not in (family.gate, family.up, family.down)]
        for path in paths:
            yield self.linear(layer.get_submodule(path), f"{prefix}.{path}")

    def linear(self, linear: Any, name: str) -> Replacement:
        shape = _shape(linear)
        if type(linear) is QuantisedLinear:
            return Replacement(name, "Linear", shape, True, "quantised: runs our kernel by itself")
        reason = self._refusal(linear) or self._slower(shape, linear)
        if not reason:
            self._convert(linear, 1)
        return Replacement(name, "Linear", shape, not reason, reason)

    def gated(self, layer: nn.Module, prefix: str) -> Replacement:
        family = self.family
        assert family.gate is not None  # asked of gated families only
        paths = (family.gate, family.up, family.down)
        mlp_path = family.down.rpartition(".")[0]
        mlp, linears = layer.get_submodule(mlp_path), linears_of(layer, family)
        gate, up, down = (linears[part] for part in ("gate", "up", "down"))
        shape = _mlp_shape(linears)
        reason = next(filter(None, map(self._refusal, (gate, up, down))), "") or _other_mlp(mlp, mlp_path, paths)
        reason = reason or self._slower(shape, down)
        replaced = not reason
        if replaced:
            for linear, parts in ((gate, 1 + (gate is up)), (up, 1), (down, 1)):
                if type(linear) is nn.Linear:
                    self._convert(linear, parts)
                elif parts == 2 and isinstance(linear, QuantisedLinear):
                    linear.as_pair()
            names = tuple(path.rpartition(".")[2] for path in paths)
            GatedMLP.convert(mlp, names, ACTIVATIONS[type(_activation(mlp)).__name__])  # type: ignore[arg-type]
            reason = PACKED if self.bits is None and isinstance(gate, HeldLinear) else ""
        return Replacement(f"{prefix}.{mlp_path}", "MLP", shape, replaced, reason)

    def _refusal(self, linear: Any) -> str:
        """Why a kernel cannot stand for this Linear, whatever its speed."""
        if type(linear) not in (nn.Linear, QuantisedLinear):
            return f"a {type(linear).__name__}, not an nn.Linear"
        if "forward" in vars(linear):
            return "has a forward of its own"
        if 0 in _shape(linear):
            return "nothing is left of it"
        if type(linear) is QuantisedLinear:
            return ""
        if id(linear.weight) in self.shared:
            return "its weight is tied to another module's"
        return "" if linear.weight.dtype in FLOATS else f"weights of {linear.weight.dtype}"

    def _slower(self, shape: tuple[int, ...], linear: Any) -> str:
        if not self.measure or type(linear) is QuantisedLinear:
            return ""
        found = timing(shape, self.bits, linear.weight.dtype, linear.weight.device)
        return "" if found.faster else "the library is as fast at this shape"

    def _convert(self, linear: nn.Linear, parts: int) -> None:
        weight = linear.weight.detach()
        if parts == 2:
            weight = weight.unflatten(0, (2, -1))
        if self.bits is not None:
            packed = pack(weight, bits=self.bits, group_size=self.group_size)
            HeldLinear.convert(linear, packed, self.keep_weights)
        elif parts == 2 and weight.shape[1] % LINE:  # rows of padding between gate and up: no view of it is the weight
            HeldLinear.convert(linear, pack(weight))
        else:
            SharedLinear.convert(linear, packed_exactly(weight))


def _activation(mlp: nn.Module) -> nn.Module | None:
    """The one child that is no Linear."""
    others = [child for child in mlp.children() if not isinstance(child, nn.Linear | Packed)]
    return others[0] if len(others) == 1 else None


def _other_mlp(mlp: nn.Module, path: str, paths: tuple[str, ...]) -> str:
    """Why a module is not down(act(gate(x)) * up(x)) with an activation that the kernels have."""
    if not path or any(each.rpartition(".")[0] != path for each in paths):
        return "gate, up and down are not children of one module"
    if "forward" in vars(mlp):
        return "has a forward of its own"
    activation = _activation(mlp)
    if activation is None or type(activation).__name__ not in ACTIVATIONS:
        return f"an activation that the kernels do not have: {type(activation).__name__}"
    gate, up, down = (getattr(mlp, each.rpartition(".")[2]) for each in paths)
    if (gate.bias is None) != (up.bias is None):
        return "one of gate and up has a bias"
    if type(gate) is not type(up):
        return "one of gate and up is quantised"
    like = gate.qscale if isinstance(gate, QuantisedLinear) else gate.weight
    probe = torch.linspace(-1, 1, gate.in_features, dtype=torch.float32).to(like)[None]
    g, u = gate(probe).chunk(2, -1) if gate is up else (gate(probe), up(probe))
    name = ACTIVATIONS[type(activation).__name__]
    inner = F.silu(g) * u if name == "silu" else F.gelu(g, approximate="tanh") * u
    same = torch.allclose(mlp(probe), down(inner), rtol=1e-2, atol=1e-3, equal_nan=True)
    return "" if same else f"{type(mlp).__name__} computes something else than down(act(gate(x)) * up(x))"
