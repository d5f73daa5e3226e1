"""Torch-Pruning's Taylor importance from a backward pass that makes no gradient of any Linear weight.

    importance = TaylorImportance()
    pruner = tp.pruner.BasePruner(model, example_inputs, importance=importance, ...)
    with importance.collect(model):
        model(input_ids=ids, labels=ids).loss.backward()
    pruner.step()

Torch-Pruning's own class needs ``.grad`` of every weight; here the sums |w * dw| over rows and columns are
formed while the backward pass runs, and dw never exists. Needs ``torch-pruning`` 1.6 (the extra of that name).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import saap_kernels
from saap.record import RecordedLinear, operands
from saap.undo import Undo

try:
    from torch_pruning.dependency import Group
    from torch_pruning.pruner import function
    from torch_pruning.pruner.importance import GroupTaylorImportance
except ImportError as error:
    raise ImportError("saap.adapters.torch_pruning needs Torch-Pruning: pip install 'saap[torch-pruning]'") from error

AXES = {function.prune_linear_out_channels: "out", function.prune_linear_in_channels: "in"}
Axis = tuple[nn.Module, str]  # a layer and "out" (rows of its weight), "in" (columns) or "bias"


class TaylorImportance(GroupTaylorImportance):  # type: ignore[misc]  # Torch-Pruning has no types
    """Drop-in for ``tp.importance.GroupTaylorImportance`` on models of nn.Linear and nn.LayerNorm.

    Per channel of a group sum |w * dw| (Molchanov et al., CVPR 2019), |sum w * dw| with ``multivariable``;
    ``group_reduction``, ``normalizer`` and ``bias`` mean what they mean there. Calling it returns (channels,)
    fp32, or None for a group without parameters. Raises RuntimeError when the group's layers were not
    collected, or were pruned since; ValueError for layers of other types, experts and tied weights.
    """

    def __init__(
        self,
        group_reduction: str = "mean",
        normalizer: Any = "mean",
        multivariable: bool = False,
        bias: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(group_reduction, normalizer, multivariable, bias)
        self.backend = backend
        self._importance: dict[Axis, Tensor] = {}
        self._tied: set[nn.Module] = set()

    @contextmanager
    def collect(self, model: nn.Module, groups: Iterable[Group] | None = None) -> Iterator[None]:
        """Measure ``model``'s layers during one forward and one backward pass inside the context.

        ``groups``, for instance ``pruner.DG.get_all_groups(...)``, limits the work to the axes they prune;
        None takes rows and columns of every Linear. Earlier results are dropped. requires_grad, ``.grad`` and
        every forward are left as found, also after an exception. Raises RuntimeError for a second backward
        pass (absolute values do not add up over passes) and when none ran.
        """
        self._importance.clear()
        if any(isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) for module in model.modules()):
            raise ValueError("mixtures of experts are not supported: their experts are 3-D tensors, not nn.Linear")
        self._tied = _tied(model)
        wanted = _axes(model) if groups is None else _axes_of(groups)
        undo = Undo()
        try:
            norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
            of_norms = [parameter for norm in norms for parameter in norm.parameters()]
            known = {id(parameter) for parameter in of_norms}
            undo.freeze(parameter for parameter in model.parameters() if id(parameter) not in known)
            for parameter in of_norms:
                _borrow_gradient(parameter, undo)
            for linear, axes in wanted.items():
                if linear not in self._tied and linear.weight.numel():
                    undo.patch_forward(linear, self._recorded(linear, axes))
            yield
            for norm in norms:
                self._put_norm(norm)
        finally:
            undo.restore()
        if not self._importance:
            raise RuntimeError("expected a backward pass inside collect, none reached the model's layers")

    def _recorded(self, linear: nn.Linear, axes: set[str]) -> Any:
        def sink(x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor) -> None:
            self._put_linear(linear, axes, x.contiguous(), y, dx, dy.contiguous())

        def forward(x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()  # the backward pass must come here, although no weight asks for it
            return RecordedLinear.apply(x, linear, sink, self.multivariable)

        return forward

    def _put_linear(
        self, linear: nn.Linear, axes: set[str], x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor
    ) -> None:
        with saap_kernels.use_backend(self.backend):
            measured = self._vector(linear, axes, x, y, dx, dy) if self.multivariable else _element(linear, axes, x, dy)
        for axis, salience in measured.items():
            self._put(linear, axis, salience)
        if self.bias and linear.bias is not None:
            self._put(linear, "bias", (linear.bias.detach().float() * dy.float().sum(0)).abs())

    @staticmethod
    def _vector(
        linear: nn.Linear, axes: set[str], x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor
    ) -> dict[str, Tensor]:
        """|sum w * dw| of rows and columns, from activations alone."""
        assert y is not None  # kept when multivariable
        found = {}
        if "in" in axes:
            found["in"] = saap_kernels.activation_salience(x, dx.contiguous(), _whole(x))[0].abs()
        if "out" in axes:
            bias = operands(linear, y.dtype)[1]
            product = (y if bias is None else y - bias).contiguous()
            found["out"] = saap_kernels.activation_salience(product, dy, _whole(x))[0].abs()
        return found

    def _put_norm(self, norm: nn.LayerNorm) -> None:
        for axis, parameter in (("out", norm.weight), ("bias", norm.bias)):
            if parameter is not None and parameter.grad is not None:
                self._put(norm, axis, (parameter.detach() * parameter.grad).abs().float())

    def _put(self, layer: nn.Module, axis: str, importance: Tensor) -> None:
        if (layer, axis) in self._importance:
            raise RuntimeError("a second backward pass inside collect: sums of absolute values need one pass only")
        self._importance[layer, axis] = importance

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        values: list[Tensor] = []
        roots: list[Any] = []
        for item in group:
            layer: nn.Module = item.dep.target.module
            handler = item.dep.handler
            if not isinstance(layer, tuple(self.target_types)):
                continue
            if isinstance(layer, nn.LayerNorm):
                if handler != function.prune_layernorm_out_channels or not layer.elementwise_affine:
                    continue  # the side of a LayerNorm that Torch-Pruning does not count
                axis = "out"
            elif handler in AXES and type(layer) is nn.Linear:
                axis = AXES[handler]
            else:
                raise ValueError(f"expected Linear and LayerNorm layers, got {item.dep.target.name}")
            kinds = [axis] + ["bias"] * (self.bias and axis == "out" and getattr(layer, "bias", None) is not None)
            for kind in kinds:
                values.append(self._of(layer, kind, item.dep.target.name)[sorted(item.idxs)])
                roots.append(item.root_idxs)
        if not values:
            return None
        importance: Tensor = self._normalize(self._reduce(values, roots), self.normalizer)
        return importance

    def _of(self, layer: Any, axis: str, name: str) -> Tensor:
        if layer in self._tied:
            raise ValueError(f"{name}: its weight belongs to another layer too, whose gradient is not measured")
        if (layer, axis) not in self._importance:
            raise RuntimeError(f"{name}: nothing measured; run a backward pass inside collect(model) with its groups")
        importance, weight = self._importance[layer, axis], layer.weight
        channels = weight.shape[1] if axis == "in" else weight.shape[0]
        if len(importance) != channels:
            raise RuntimeError(f"{name}: measured {len(importance)} channels, now has {channels}; collect again")
        return importance


def _whole(x: Tensor) -> Tensor:
    """The whole batch as one span: its summed gradient is what ``.grad`` would hold."""
    return torch.tensor([[0, len(x)]], dtype=torch.int32)


def _element(linear: nn.Linear, axes: set[str], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """sum |w * dw| of rows and columns."""
    arguments, want = (x, dy, operands(linear, dy.dtype)[0], _whole(x)), ("abs",)
    if len(axes) == 2:
        rows, columns = saap_kernels.weight_salience_both(*arguments, want=want)
        return {"out": rows[0, 0], "in": columns[0, 0]}
    return {axis: saap_kernels.weight_salience(*arguments, axis=axis, want=want)[0, 0] for axis in axes}


def _axes(model: nn.Module) -> dict[nn.Linear, set[str]]:
    return {module: {"in", "out"} for module in model.modules() if type(module) is nn.Linear}


def _axes_of(groups: Iterable[Group]) -> dict[nn.Linear, set[str]]:
    wanted: dict[nn.Linear, set[str]] = {}
    for group in groups:
        for item in group:
            if item.dep.handler in AXES and isinstance(item.dep.target.module, nn.Linear):
                wanted.setdefault(item.dep.target.module, set()).add(AXES[item.dep.handler])
    return wanted


def _tied(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight another layer holds too."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            owners.setdefault(id(weight), []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def _borrow_gradient(parameter: nn.Parameter, undo: Undo) -> None:
    """Let a small parameter collect a gradient of its own, which ``undo`` replaces by the former one."""
    undo.add(partial(setattr, parameter, "grad", parameter.grad))
    undo.add(partial(parameter.requires_grad_, parameter.requires_grad))
    parameter.grad = None
    parameter.requires_grad_(True)
