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
from saap.expert_record import ExpertRecorder
from saap.experts import each_projection, experts_of
from saap.families import Family, Projection, family_of, layers_of, projections_by_linear
from saap.record import BatchRecord, LayerRecord, RecordedLinear, operands
from saap.statistics import COUPLED, Statistics, merge_feature_moments
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
                module.coupled = torch.zeros(len(COUPLED), *module.signed.shape, dtype=torch.float64)
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
            if self.family.experts is not None:
                experts = experts_of(layer, self.family)
                self._undo.patch_forward(experts, ExpertRecorder(self, index, experts).forward)
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
        units = self.statistics.units.layers
        layers = range(len(units)) if layer is None else [layer]
        if self.coupled and (self.batch is not None or any(self._folded[index][0] for index in layers)):
            raise RuntimeError("coupled statistics are exact for one forward and backward pass only, got a second one")
        matrices = self._matrices.items()  # of modules that have units left
        self.batch = BatchRecord(spans, {i: {m: parts for m, parts in matrices if units[i].count(m)} for i in layers})

    def finish(self) -> None:
        """Fold the micro-batch into the statistics; raises ValueError naming a layer whose gradient is not finite."""
        assert self.batch is not None
        self.fold(self.batch)
        self.batch = None

    def _record(
        self, batch: BatchRecord, index: int, part: str, projection: Projection,
        x: Tensor, y: Tensor | None, dx: Tensor, dy: Tensor,
    ) -> None:  # fmt: skip
        module, size = module_of(part), self.statistics.units.layers[index].rows_per_unit(part)
        (weight, bias), spans, inside = operands(projection, dy.dtype), batch.spans, part in IN_PARTS
        record = batch.layers[index][module]
        with saap_kernels.use_backend(self.backend):
            options: dict[str, Any] = {
                "axis": "in" if inside else "out", "unit_size": size,
                "bias": None if inside else bias, "scale": self.scale,
            }  # fmt: skip
            element = saap_kernels.weight_salience(x, dy, weight, spans, want=ELEMENT_WANT, **options)
            coupled = saap_kernels.coupled_salience(x, dy, weight, spans, **options) if self.coupled else None
            if inside:
                shift = self._shift(batch, index, module, x.device)
                lines, inputs = saap_kernels.activation_salience_statistics(
                    x, dx, spans, shift=shift, want=("sum", "square", "absmax", "abs")
                )
                record.put_inputs(shift, inputs, batch.lengths(x.device), batch.tokens)
            else:
                assert y is not None  # kept for every part whose rows belong to units
                lines = saap_kernels.activation_salience(y, dy, spans)
        record.put(part, lines.double() * self.scale, element, coupled)

    def _shift(self, batch: BatchRecord, index: int, module: str, device: torch.device) -> Tensor:
        """What is known of the mean of an input, fp32; all layers of a batch get theirs in one transfer."""
        offsets, first, last = self._features[module], min(batch.layers), max(batch.layers)
        means = self.statistics.modules[module].input_mean[offsets[first] : offsets[last + 1]]
        start, stop = offsets[index] - offsets[first], offsets[index + 1] - offsets[first]
        return batch.there(f"mean input of {module}", device, means.float)[start:stop]

    def _add_inputs(self, index: int, module: str, batch: BatchRecord, sums: dict[str, Tensor]) -> None:
        """Merge the moments of an input over a batch's tokens into the statistics."""
        sequences, tokens = self._folded[index]
        merge_feature_moments(
            self._feature_slice(index, module, "input_mean"),
            self._feature_slice(index, module, "input_m2"),
            tokens,
            sums["input_mean"],
            sums["input_m2"],
            batch.tokens,
        )
        activity = self._feature_slice(index, module, "input_activity")
        activity += (sums["input_activity"] - activity) * (len(batch.spans) / (sequences + len(batch.spans)))
        largest = self._feature_slice(index, module, "input_absmax")
        torch.maximum(largest, sums["input_absmax"], out=largest)

    def _feature_slice(self, index: int, module: str, name: str) -> Tensor:
        start, stop = self._features[module][index : index + 2]
        return getattr(self.statistics.modules[module], name)[start:stop]

    def fold(self, batch: BatchRecord) -> None:
        """Add a complete micro-batch to the statistics; see ``finish``."""
        batch.check()
        for index, records in batch.layers.items():
            found, influence = batch.take(index), self.statistics.influence
            for name, record in records.items():
                self._fold(index, name, record, batch)
                record.sums.clear()
            sequences, tokens = self._folded[index]
            influence[index] += (found - influence[index]) * (batch.tokens / (tokens + batch.tokens))
            self._folded[index] = sequences + len(batch.spans), tokens + batch.tokens
        for module in self.statistics.modules.values():
            module.salience.count = min(sequences for sequences, _ in self._folded)
        self.statistics.tokens = min(tokens for _, tokens in self._folded)

    def _fold(self, index: int, name: str, record: LayerRecord, batch: BatchRecord) -> None:
        module, start = self.statistics.modules[name], self._offsets[name][index]
        units, new = record.sums["signed"].shape[-1], len(batch.spans)
        sequences, tokens = self._folded[index]
        moments = module.salience.narrow(start, units)
        moments.count = sequences  # of this layer; another may have seen more or fewer
        moments.merge_(record.moments(new))
        self._add_inputs(index, name, batch, record.sums)
        if "coupled" in record.sums:
            assert module.coupled is not None  # made on construction
            module.coupled[..., start : start + units] = record.sums["coupled"]
        if "experts" in record.sums:
            experts = self.statistics.experts[:, slice(*self.statistics.units.expert_offsets()[index : index + 2])]
            experts += (record.sums["experts"] - experts) * (batch.tokens / (tokens + batch.tokens))
        signed = module.signed.narrow(-1, start, units)
        signed += (record.sums["signed"] - signed) * (new / (sequences + new))

    def measure_weights(self, index: int) -> None:
        """Read the norms of one layer's weights."""
        sizes = self.statistics.units.layers[index]
        layer = layers_of(self.model, self.family)[index]
        for part, norms in line_norms(each_projection(layer, self.family)).items():
            name = module_of(part)
            if not sizes.count(name):
                continue
            module = self.statistics.modules[name]
            row, start = module.matrices.index(part), self._offsets[name][index]
            units = slice(start, start + sizes.count(name))
            for kind, lines in zip(("l1", "square"), norms, strict=True):
                getattr(module, f"weight_{kind}")[row, units] = by_unit(lines, sizes, part)
                if part in IN_PARTS:
                    self._feature_slice(index, name, f"column_{kind}").copy_(lines)
