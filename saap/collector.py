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
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import saap_kernels
from saap.families import Family, Projection, family_of, layers_of, projections_by_linear, projections_of
from saap.record import BatchRecord, LayerRecord, RecordedLinear
from saap.statistics import Statistics, merge_feature_moments
from saap.undo import Undo
from saap.units import IN_PARTS, Units, module_of
from saap.weight_norms import by_unit, line_norms

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
            for linear, parts in projections_by_linear(layer, self.family).items():
                if not self.statistics.units.layers[index].count(module_of(next(iter(parts)))):
                    continue  # an attention or MLP of which nothing is left
                self._undo.patch_forward(linear, self._recorded_forward(index, linear, parts))
            if self._read_weights:
                self.measure_weights(index)
            self._undo.add(layer.register_forward_hook(partial(self._watch, index), with_kwargs=True).remove)
            if self.checkpoint_layers:
                self._undo.patch_forward(layer, self._checkpointed(layer.forward))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        self._undo.restore()
        self.batch = None

    def _recorded_forward(
        self, index: int, linear: nn.Linear, parts: dict[str, Projection]
    ) -> Callable[[Tensor], Tensor]:
        keep_output = not any(part in IN_PARTS for part in parts)

        def forward(x: Tensor) -> Tensor:
            batch = self.batch  # of this forward: by the time of its backward another may have begun

            def sink(x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor) -> None:
                if batch is None:
                    raise RuntimeError("call begin(spans) before the forward pass of a micro-batch")
                x, dy = x.contiguous(), dy.contiguous()
                for part, projection in parts.items():
                    of_part = None if y is None else y[:, projection.rows]
                    self._record(batch, index, part, projection, x, of_part, dx, dy[:, projection.rows])

            return RecordedLinear.apply(x, linear, sink, keep_output)

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

    def _watch(self, index: int, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note a layer's influence on the hidden states; recomputation does not pass here."""
        if self.batch is not None and torch.is_grad_enabled():
            before = args[0] if args else kwargs["hidden_states"]
            self.batch.note_influence(index, before, output[0] if isinstance(output, tuple) else output)

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
        self, batch: BatchRecord, index: int, part: str, projection: Projection,
        x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor,
    ) -> None:  # fmt: skip
        sizes = self.statistics.units.layers[index]
        module = module_of(part)
        size = sizes.rows_per_unit(part)
        spans, weight = batch.spans, projection.weight
        inside = part in IN_PARTS
        with saap_kernels.use_backend(self.backend):
            options: dict[str, Any] = {
                "axis": "in" if inside else "out", "unit_size": size,
                "bias": None if inside else projection.bias, "scale": self.scale,
            }  # fmt: skip
            element = saap_kernels.weight_salience(x, dy, weight, spans, want=ELEMENT_WANT, **options)
            coupled = saap_kernels.coupled_salience(x, dy, weight, spans, **options) if self.coupled else None
            if inside:
                shift = self._feature_slice(index, module, "input_mean").to(x.device, torch.float32)
                vector, inputs = saap_kernels.activation_salience_statistics(
                    x, dx, spans, unit_size=size, shift=shift, want=("sum", "square", "absmax", "abs")
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

    def _add_inputs(self, index: int, module: str, batch: BatchRecord, shift: Tensor, sums: Tensor) -> None:
        """Merge sums (4, S, C), the first two about ``shift``, into the moments of an input."""
        sequences, tokens = self._folded[index]
        total, square = sums[:2].sum(1)  # each [C]
        mean = total / batch.tokens
        merge_feature_moments(
            self._feature_slice(index, module, "input_mean"),
            self._feature_slice(index, module, "input_m2"),
            tokens,
            mean + shift,
            (square - total * mean).clamp_min(0),
            batch.tokens,
        )
        activity = self._feature_slice(index, module, "input_activity")
        found = (sums[3] / batch.lengths[:, None]).square().mean(0)
        activity += (found - activity) * (len(batch.lengths) / (sequences + len(batch.lengths)))
        largest = self._feature_slice(index, module, "input_absmax")
        torch.maximum(largest, sums[2].amax(0), out=largest)

    def _feature_slice(self, index: int, module: str, name: str) -> Tensor:
        start, stop = self._features[module][index : index + 2]
        return getattr(self.statistics.modules[module], name)[start:stop]

    def fold(self, batch: BatchRecord) -> None:
        """Add a complete micro-batch to the statistics; see ``finish``."""
        batch.check()
        for (index, name), record in batch.layers.items():
            self._fold(index, name, record, batch)
        for index in batch.indices:
            sequences, tokens = self._folded[index]
            influence = self.statistics.influence
            influence[index] += (batch.influence(index) - influence[index]) * (batch.tokens / (tokens + batch.tokens))
            self._folded[index] = sequences + len(batch.spans), tokens + batch.tokens
        for module in self.statistics.modules.values():
            module.salience.count = min(sequences for sequences, _ in self._folded)
        self.statistics.tokens = min(tokens for _, tokens in self._folded)

    def _fold(self, index: int, name: str, record: LayerRecord, batch: BatchRecord) -> None:
        module, start = self.statistics.modules[name], self._offsets[name][index]
        units, new = record.vector.shape[-1], len(batch.spans)
        sequences, _ = self._folded[index]
        moments = module.salience.narrow(start, units)
        moments.count = sequences  # of this layer; another may have seen more or fewer
        moments.merge_(record.moments())
        assert record.inputs is not None  # complete records have it
        self._add_inputs(index, name, batch, *record.inputs)
        if record.coupled is not None:
            assert module.coupled is not None  # made on construction
            module.coupled[..., start : start + units] = record.coupled
        signed = module.signed.narrow(-1, start, units)
        signed += (record.vector.mean(0) - signed) * (new / (sequences + new))

    def measure_weights(self, index: int) -> None:
        """Read the norms of one layer's weights."""
        sizes = self.statistics.units.layers[index]
        for part, projection in projections_of(layers_of(self.model, self.family)[index], self.family).items():
            name = module_of(part)
            if not sizes.count(name):
                continue
            module = self.statistics.modules[name]
            row, start = module.matrices.index(part), self._offsets[name][index]
            units = slice(start, start + sizes.count(name))
            for kind, lines in zip(("l1", "square"), line_norms(projection, part), strict=True):
                getattr(module, f"weight_{kind}")[row, units] = by_unit(lines, sizes, part)
                if part in IN_PARTS:
                    self._feature_slice(index, name, f"column_{kind}").copy_(lines)
