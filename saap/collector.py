"""Record importance statistics during a backward pass in which no weight requires grad.

Every prunable Linear runs through an autograd function that keeps its input (and, for rows, its
output), receives the gradient of its output and hands both to the kernels. Weights are reached
through the module, never saved for backward, and never get a gradient.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import saap_kernels
from saap.families import Family, family_of, layers_of, linears_of
from saap.record import BatchRecord, LayerRecord, RecordedLinear
from saap.statistics import Statistics, merge_feature_moments
from saap.undo import Undo
from saap.units import IN_PARTS, Units, module_of
from saap.weight_norms import weight_norms

ELEMENT_WANT = ("abs", "square", "mixed")  # in the order of ORDERS


class Collector:
    """Context manager that turns backward passes of ``model`` into ``statistics``.

    Inside it the model is in eval mode, no parameter requires grad, and each decoder layer runs
    under activation checkpointing if ``checkpoint_layers``. Call ``begin(spans)`` before the
    forward of a micro-batch and ``finish()`` after its backward; spans (S, 2) are the half-open row
    ranges of its sequences in the flattened batch. With ``read_weights`` False the norms of the weights
    are left to ``measure_weights``. On exit, training mode, requires_grad and every forward are as they
    were, also after an exception. ``collect`` does the same for any loop.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Units,
        *,
        checkpoint_layers: bool = False,
        backend: str | None = None,
        loss_scale: float = 1.0,
        coupled: bool = False,
        read_weights: bool = True,
    ) -> None:
        self.model = model
        self.family: Family = family_of(model, units.family)
        self.statistics = Statistics.zeros(units)
        self.checkpoint_layers = checkpoint_layers
        self.coupled = coupled
        self._read_weights = read_weights
        self.backend = backend
        self.scale = 1.0 / loss_scale
        self._offsets = {module: units.offsets(module) for module in self.statistics.modules}
        self._features = {module: units.feature_offsets(module) for module in self.statistics.modules}
        if coupled:
            for module in self.statistics.modules.values():
                module.coupled = torch.zeros(len(ELEMENT_WANT), *module.signed.shape, dtype=torch.float64)
        self._matrices = {name: module.matrices for name, module in self.statistics.modules.items()}
        self._folded = [(0, 0)] * len(units.layers)  # sequences and tokens that each layer has seen
        self.batch: BatchRecord | None = None
        self._undo = Undo()

    def __enter__(self) -> "Collector":
        try:
            self._enter()
        except BaseException:
            self._restore()
            raise
        return self

    def _enter(self) -> None:
        model = self.model
        self._undo.eval_mode(model)
        self._undo.freeze(model.parameters())
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        self._undo.add(handle.remove)
        for index, layer in enumerate(layers_of(model, self.family)):
            for part, linear in linears_of(layer, self.family).items():
                self._undo.patch_forward(linear, self._recorded_forward(index, part, linear))
            if self._read_weights:
                self.measure_weights(index)
            if self.checkpoint_layers:
                self._undo.patch_forward(layer, self._checkpointed(layer.forward))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        self._undo.restore()
        self.batch = None

    def _recorded_forward(self, index: int, part: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            batch = self.batch  # of this forward: by the time of its backward another may have begun

            def sink(x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor) -> None:
                if batch is None:
                    raise RuntimeError("call begin(spans) before the forward pass of a micro-batch")
                self._record(batch, index, part, linear, x, y, dx, dy)

            return RecordedLinear.apply(x, linear, sink, part not in IN_PARTS)

        return forward

    def _checkpointed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            batch = self.batch

            def again(*args: Any, **kwargs: Any) -> Any:
                current, self.batch = self.batch, batch  # recomputation belongs to the batch of the first pass
                try:
                    return forward(*args, **kwargs)
                finally:
                    self.batch = current

            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    def begin(self, spans: Tensor, layer: int | None = None) -> None:
        """Start a micro-batch of len(spans) sequences through one ``layer``, or through all of them (None).

        Raises RuntimeError for a second one of coupled statistics.
        """
        layers = dict(enumerate(self.statistics.units.layers))
        if layer is not None:
            layers = {layer: layers[layer]}
        if self.coupled and (self.batch is not None or any(self._folded[index][0] for index in layers)):
            raise RuntimeError("coupled statistics are exact for one forward and backward pass only, got a second one")
        self.batch = BatchRecord(spans, layers, self._matrices, self.coupled)

    def finish(self) -> None:
        """Fold the micro-batch into the statistics; raises ValueError naming a layer whose gradient is not finite."""
        assert self.batch is not None
        self.fold(self.batch)
        self.batch = None

    def _record(
        self, batch: BatchRecord, index: int, part: str, linear: nn.Linear,
        x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor,
    ) -> None:  # fmt: skip
        sizes = self.statistics.units.layers[index]
        module = module_of(part)
        size = sizes.rows_per_unit(part)
        x, dy, spans = x.contiguous(), dy.contiguous(), batch.spans
        inside = part in IN_PARTS
        with saap_kernels.use_backend(self.backend):
            options: dict[str, Any] = {
                "axis": "in" if inside else "out", "unit_size": size,
                "bias": None if inside else linear.bias, "scale": self.scale,
            }  # fmt: skip
            element = saap_kernels.weight_salience(x, dy, linear.weight, spans, want=ELEMENT_WANT, **options)
            coupled = saap_kernels.coupled_salience(x, dy, linear.weight, spans, **options) if self.coupled else None
            if inside:
                shift = self._input_slice(index, module, "input_mean").to(x.device, torch.float32)
                vector, inputs = saap_kernels.activation_salience_statistics(
                    x, dx, spans, unit_size=size, shift=shift, want=("sum", "square", "absmax")
                )
                batch.layers[index, module].inputs = shift.double().cpu(), inputs.double().cpu()
            else:
                assert y is not None  # kept for every part whose rows belong to units
                vector = saap_kernels.activation_salience(y, dy, spans, unit_size=size)
        batch.layers[index, module].put(
            part,
            vector.double().cpu() * self.scale,
            element.double().cpu(),
            None if coupled is None else coupled.double().cpu(),
        )

    def _add_inputs(self, index: int, module: str, tokens: int, new: int, shift: Tensor, sums: Tensor) -> None:
        """Merge sums (3, S, C) about ``shift`` over ``new`` tokens into moments over ``tokens``."""
        total, square = sums[:2].sum(1)  # each [C]
        mean = total / new
        merge_feature_moments(
            self._input_slice(index, module, "input_mean"),
            self._input_slice(index, module, "input_m2"),
            tokens,
            mean + shift,
            (square - total * mean).clamp_min(0),
            new,
        )
        largest = self._input_slice(index, module, "input_absmax")
        torch.maximum(largest, sums[2].amax(0), out=largest)

    def _input_slice(self, index: int, module: str, name: str) -> Tensor:
        start, stop = self._features[module][index : index + 2]
        return getattr(self.statistics.modules[module], name)[start:stop]

    def fold(self, batch: BatchRecord) -> None:
        """Add a complete micro-batch to the statistics; see ``finish``."""
        batch.check()
        for (index, name), record in batch.layers.items():
            self._fold(index, name, record, batch)
        for index in {index for index, _ in batch.layers}:
            sequences, tokens = self._folded[index]
            self._folded[index] = sequences + len(batch.spans), tokens + batch.tokens
        for module in self.statistics.modules.values():
            module.salience.count = min(sequences for sequences, _ in self._folded)
        self.statistics.tokens = min(tokens for _, tokens in self._folded)

    def _fold(self, index: int, name: str, record: LayerRecord, batch: BatchRecord) -> None:
        module, start = self.statistics.modules[name], self._offsets[name][index]
        units, new = record.vector.shape[-1], len(batch.spans)
        sequences, tokens = self._folded[index]
        moments = module.salience.narrow(start, units)
        moments.count = sequences  # of this layer; another may have seen more or fewer
        moments.merge_(record.moments())
        assert record.inputs is not None  # complete records have it
        self._add_inputs(index, name, tokens, batch.tokens, *record.inputs)
        if record.coupled is not None:
            assert module.coupled is not None  # made on construction
            module.coupled[..., start : start + units] = record.coupled
        signed = module.signed.narrow(-1, start, units)
        signed += (record.vector.mean(0) - signed) * (new / (sequences + new))

    def measure_weights(self, index: int) -> None:
        """Read the norms of one layer's weights."""
        sizes = self.statistics.units.layers[index]
        for part, linear in linears_of(layers_of(self.model, self.family)[index], self.family).items():
            name = module_of(part)
            module = self.statistics.modules[name]
            row, start = module.matrices.index(part), self._offsets[name][index]
            l1, square = weight_norms(linear, sizes, part)
            module.weight_l1[row, start : start + len(l1)] = l1
            module.weight_square[row, start : start + len(l1)] = square
