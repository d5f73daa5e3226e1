"""Record importance statistics during a backward pass in which no weight requires grad.

Every prunable Linear runs through an autograd function that keeps its input (and, for rows, its
output), receives the gradient of its output and hands both to the kernels. Weights are reached
through the module, never saved for backward, and never get a gradient.
"""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import saap_kernels
from saap.families import Family, family_of, layers_of, linears_of
from saap.moments import Moments
from saap.statistics import ORDERS, ModuleStatistics, Statistics, merge_feature_moments
from saap.units import LayerUnits, Units

ELEMENT_WANT = ("abs", "square", "mixed")  # in the order of ORDERS
IN_PARTS = ("o", "down")  # their columns belong to units; of the others, rows


class _RecordedLinear(torch.autograd.Function):
    """y = x W' + b whose backward also reports (x, y, dx, dy) to a sink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Linear, sink: Callable[..., None], keep_output: bool) -> Tensor:
        y = F.linear(x, linear.weight, linear.bias)
        ctx.linear, ctx.sink = linear, sink
        ctx.save_for_backward(x, y if keep_output else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        dx = dy @ ctx.linear.weight
        ctx.sink(x.flatten(0, -2), None if y is None else y.flatten(0, -2), dx.flatten(0, -2), dy.flatten(0, -2))
        return dx, None, None, None


class _LayerRecord:
    """Per-sequence sums of one layer and one module while a micro-batch runs backward."""

    def __init__(self, matrices: tuple[str, ...], units: int, sequences: int) -> None:
        self.matrices = matrices
        self.vector = torch.zeros(sequences, len(matrices), units, dtype=torch.float64)  # [S, M, U]
        self.element = torch.zeros(len(ORDERS), sequences, len(matrices), units, dtype=torch.float64)  # [3, S, M, U]
        self.seen: set[str] = set()

    def put(self, part: str, vector: Tensor, element: Tensor) -> None:
        column = self.matrices.index(part)
        self.vector[:, column] = vector
        self.element[:, :, column] = element
        self.seen.add(part)

    def moments(self) -> Moments:
        """Moments of (3, P, U) with the aggregate rows "joint" and "sum" appended."""
        per_matrix = vector_orders(self.vector)  # [3, S, M, U]
        joint = vector_orders(self.vector.sum(1, keepdim=True))
        vector = torch.cat([per_matrix, joint, per_matrix.sum(2, keepdim=True)], 2)
        total = self.element.sum(2, keepdim=True)
        element = torch.cat([self.element, total, total], 2)
        return Moments.of(vector.movedim(1, 0), element.movedim(1, 0))


def vector_orders(signed: Tensor) -> Tensor:
    """|a|, a^2 and |a - a^2 / 2| stacked in front: (...) -> (3, ...), method section 2a."""
    square = signed.square()
    return torch.stack([signed.abs(), square, (signed - 0.5 * square).abs()])


class Collector:
    """Context manager that turns backward passes of ``model`` into ``statistics``.

    Inside it the model is in eval mode, no parameter requires grad, and each decoder layer runs
    under activation checkpointing if ``checkpoint_layers``. Call ``begin(spans)`` before the
    forward of a micro-batch and ``finish()`` after its backward; spans (S, 2) are the half-open row
    ranges of its sequences in the flattened batch. On exit, training mode, requires_grad and every
    forward are as they were, also after an exception.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Units,
        *,
        checkpoint_layers: bool = False,
        backend: str | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        self.model = model
        self.family: Family = family_of(model, units.family)
        self.statistics = Statistics.zeros(units)
        self.checkpoint_layers = checkpoint_layers
        self.backend = backend
        self.scale = 1.0 / loss_scale
        self._offsets = {module: units.offsets(module) for module in self.statistics.modules}
        self._features = _feature_offsets(units)
        self._records: dict[tuple[int, str], _LayerRecord] = {}
        self._spans: Tensor | None = None
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> "Collector":
        try:
            self._enter()
        except BaseException:
            self._restore()
            raise
        return self

    def _enter(self) -> None:
        model = self.model
        training = [module for module in model.modules() if module.training]
        self._undo.extend(partial(setattr, module, "training", True) for module in training)
        model.eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._undo.append(partial(parameter.requires_grad_, True))
                parameter.requires_grad_(False)
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        self._undo.append(handle.remove)
        for index, layer in enumerate(layers_of(model, self.family)):
            for part, linear in linears_of(layer, self.family).items():
                self._patch(linear, self._recorded_forward(index, part, linear))
                self._measure_weight(index, part, linear)
            if self.checkpoint_layers:
                self._patch(layer, _checkpointed(layer.forward))

    def _patch(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        previous = module.__dict__.get("forward")
        if previous is None:
            self._undo.append(partial(module.__dict__.pop, "forward"))
        else:
            self._undo.append(partial(setattr, module, "forward", previous))
        module.forward = forward  # type: ignore[method-assign]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._records.clear()

    def _recorded_forward(self, index: int, part: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def sink(x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor) -> None:
            self._record(index, part, linear, x, y, dx, dy)

        return lambda x: _RecordedLinear.apply(x, linear, sink, part not in IN_PARTS)

    def begin(self, spans: Tensor) -> None:
        """Start a micro-batch of len(spans) sequences."""
        self._spans = spans
        sizes = self.statistics.units.layers
        self._records = {
            (index, name): _LayerRecord(module.matrices, sizes[index].count(name), len(spans))
            for index in range(len(sizes))
            for name, module in self.statistics.modules.items()
        }

    def _record(
        self, index: int, part: str, linear: nn.Linear, x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor
    ) -> None:
        if self._spans is None:
            raise RuntimeError("call begin(spans) before the forward pass of a micro-batch")
        sizes = self.statistics.units.layers[index]
        module = _module_of(part)
        size = sizes.rows_per_unit(part)
        x, dy, spans = x.contiguous(), dy.contiguous(), self._spans
        inside = part in IN_PARTS
        with saap_kernels.use_backend(self.backend):
            element = saap_kernels.weight_salience(
                x, dy, linear.weight, spans, axis="in" if inside else "out", unit_size=size,
                bias=None if inside else linear.bias, want=ELEMENT_WANT, scale=self.scale,
            )  # fmt: skip
            if inside:
                shift = self._input_slice(index, module, "input_mean").to(x.device, torch.float32)
                vector, inputs = saap_kernels.activation_salience_statistics(
                    x, dx, spans, unit_size=size, shift=shift, want=("sum", "square", "absmax")
                )
                self._add_inputs(index, module, shift, inputs.double().cpu())
            else:
                assert y is not None  # kept for every part whose rows belong to units
                vector = saap_kernels.activation_salience(y, dy, spans, unit_size=size)
        self._records[index, module].put(part, vector.double().cpu() * self.scale, element.double().cpu())

    def _add_inputs(self, index: int, module: str, shift: Tensor, inputs: Tensor) -> None:
        assert self._spans is not None
        count = int((self._spans[:, 1] - self._spans[:, 0]).sum())
        total, square = inputs[:2].sum(1)  # each [C], about shift
        mean = total / count
        merge_feature_moments(
            self._input_slice(index, module, "input_mean"),
            self._input_slice(index, module, "input_m2"),
            self.statistics.tokens,
            mean + shift.double().cpu(),
            (square - total * mean).clamp_min(0),
            count,
        )
        largest = self._input_slice(index, module, "input_absmax")
        torch.maximum(largest, inputs[2].amax(0), out=largest)

    def _input_slice(self, index: int, module: str, name: str) -> Tensor:
        start, stop = self._features[module][index : index + 2]
        return getattr(self.statistics.modules[module], name)[start:stop]

    def finish(self) -> None:
        """Fold the micro-batch into the statistics; raises ValueError naming a layer whose gradient is not finite."""
        assert self._spans is not None
        backward_order = sorted(self._records.items(), key=lambda item: item[0], reverse=True)
        for (index, name), record in backward_order:
            missing = set(record.matrices) - record.seen
            if missing:
                raise RuntimeError(
                    f"layer {index}: no gradient reached {', '.join(sorted(missing))}; was backward run?"
                )
            if not torch.isfinite(record.vector).all() or not torch.isfinite(record.element).all():
                parts = [p for p in reversed(record.matrices) if not _finite(record, p)]
                raise ValueError(f"expected finite gradients, found NaN or inf in layer {index}, {name} ({parts[0]})")
        for (index, name), record in self._records.items():
            self._fold(self.statistics.modules[name], self._offsets[name][index], record)
        for module in self.statistics.modules.values():
            module.salience.count += len(self._spans)
        self.statistics.tokens += int((self._spans[:, 1] - self._spans[:, 0]).sum())
        self._records, self._spans = {}, None

    @staticmethod
    def _fold(module: ModuleStatistics, start: int, record: _LayerRecord) -> None:
        sequences, _, units = record.vector.shape
        count = module.salience.count
        module.salience.narrow(start, units).merge_(record.moments())
        signed = module.signed.narrow(-1, start, units)
        signed += (record.vector.mean(0) - signed) * (sequences / (count + sequences))

    def _measure_weight(self, index: int, part: str, linear: nn.Linear) -> None:
        sizes = self.statistics.units.layers[index]
        name = _module_of(part)
        module = self.statistics.modules[name]
        row, start = module.matrices.index(part), self._offsets[name][index]
        l1, square = _weight_norms(linear, sizes, part)
        module.weight_l1[row, start : start + len(l1)] = l1
        module.weight_square[row, start : start + len(l1)] = square


def _module_of(part: str) -> str:
    return "attention" if part in ("q", "k", "v", "o") else "mlp"


def _finite(record: _LayerRecord, part: str) -> bool:
    column = record.matrices.index(part)
    return bool(torch.isfinite(record.vector[:, column]).all() and torch.isfinite(record.element[:, :, column]).all())


def _feature_offsets(units: Units) -> dict[str, list[int]]:
    heads = [0]
    for layer in units.layers:
        heads.append(heads[-1] + layer.query_heads * layer.head_dim)
    return {"attention": heads, "mlp": units.offsets("mlp")}


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _weight_norms(linear: nn.Linear, sizes: LayerUnits, part: str, panel: int = 256) -> tuple[Tensor, Tensor]:
    """Sum of |w| and of w^2 per unit, (U,) each in float64, read in row panels; biases included for rows."""
    weight = linear.weight.detach()
    size = sizes.rows_per_unit(part)
    if part in IN_PARTS:
        l1 = sum(rows.abs().sum(0, dtype=torch.float64) for rows in weight.split(panel))
        square = sum(rows.double().square().sum(0) for rows in weight.split(panel))
    else:
        l1 = torch.cat([rows.abs().sum(1, dtype=torch.float64) for rows in weight.split(panel)])
        square = torch.cat([rows.double().square().sum(1) for rows in weight.split(panel)])
        if linear.bias is not None:
            bias = linear.bias.detach().double()
            l1, square = l1 + bias.abs(), square + bias.square()
    return l1.view(-1, size).sum(1).cpu(), square.view(-1, size).sum(1).cpu()  # type: ignore[union-attr]
