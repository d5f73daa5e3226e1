"""Record importance statistics during a backward pass in which no weight requires grad.

Every prunable Linear runs through an autograd function that keeps its input (and, for rows, its
output), receives the gradient of its output and hands both to the kernels. Weights are reached
through the module, never saved for backward, and never get a gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import saap_kernels
from saap.families import Family, family_of, layers_of, linears_of
from saap.loss import sequence_spans
from saap.record import BatchRecord, RecordedLinear
from saap.statistics import Statistics, merge_feature_moments
from saap.undo import Undo
from saap.units import IN_PARTS, Units, discover, module_of
from saap.weight_norms import weight_norms

ELEMENT_WANT = ("abs", "square", "mixed")  # in the order of ORDERS


class Collector:
    """Context manager that turns backward passes of ``model`` into ``statistics``.

    Inside it the model is in eval mode, no parameter requires grad, and each decoder layer runs
    under activation checkpointing if ``checkpoint_layers``. Call ``begin(spans)`` before the
    forward of a micro-batch and ``finish()`` after its backward; spans (S, 2) are the half-open row
    ranges of its sequences in the flattened batch. On exit, training mode, requires_grad and every
    forward are as they were, also after an exception. ``collect`` does the same for any loop.
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
    ) -> None:
        self.model = model
        self.family: Family = family_of(model, units.family)
        self.statistics = Statistics.zeros(units)
        self.checkpoint_layers = checkpoint_layers
        self.coupled = coupled
        self.backend = backend
        self.scale = 1.0 / loss_scale
        self._offsets = {module: units.offsets(module) for module in self.statistics.modules}
        self._features = {module: units.feature_offsets(module) for module in self.statistics.modules}
        if coupled:
            for module in self.statistics.modules.values():
                module.coupled = torch.zeros(len(ELEMENT_WANT), *module.signed.shape, dtype=torch.float64)
        self._matrices = {name: module.matrices for name, module in self.statistics.modules.items()}
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
        for module in model.modules():
            if module.training:
                self._undo.add(partial(setattr, module, "training", True))
        model.eval()
        self._undo.freeze(model.parameters())
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        self._undo.add(handle.remove)
        for index, layer in enumerate(layers_of(model, self.family)):
            for part, linear in linears_of(layer, self.family).items():
                self._undo.patch_forward(linear, self._recorded_forward(index, part, linear))
                self._measure_weight(index, part, linear)
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

    def begin(self, spans: Tensor) -> None:
        """Start a micro-batch of len(spans) sequences; RuntimeError for a second one of coupled statistics."""
        if self.coupled and (self.batch is not None or self.statistics.sequences):
            raise RuntimeError("coupled statistics are exact for one forward and backward pass only, got a second one")
        self.batch = BatchRecord(spans, self.statistics.units.layers, self._matrices, self.coupled)

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

    def _add_inputs(self, index: int, module: str, count: int, shift: Tensor, sums: Tensor) -> None:
        total, square = sums[:2].sum(1)  # each [C], about shift
        mean = total / count
        merge_feature_moments(
            self._input_slice(index, module, "input_mean"),
            self._input_slice(index, module, "input_m2"),
            self.statistics.tokens,
            mean + shift,
            (square - total * mean).clamp_min(0),
            count,
        )
        largest = self._input_slice(index, module, "input_absmax")
        torch.maximum(largest, sums[2].amax(0), out=largest)

    def _input_slice(self, index: int, module: str, name: str) -> Tensor:
        start, stop = self._features[module][index : index + 2]
        return getattr(self.statistics.modules[module], name)[start:stop]

    def fold(self, batch: BatchRecord) -> None:
        """Add a complete micro-batch to the statistics; see ``finish``."""
        batch.check()
        sequences = len(batch.spans)
        for (index, name), record in batch.layers.items():
            module, start = self.statistics.modules[name], self._offsets[name][index]
            units, count = record.vector.shape[-1], module.salience.count
            module.salience.narrow(start, units).merge_(record.moments())
            assert record.inputs is not None  # complete records have it
            self._add_inputs(index, name, batch.tokens, *record.inputs)
            if record.coupled is not None:
                assert module.coupled is not None  # made on entry
                module.coupled[..., start : start + units] = record.coupled
            signed = module.signed.narrow(-1, start, units)
            signed += (record.vector.mean(0) - signed) * (sequences / (count + sequences))
        for module in self.statistics.modules.values():
            module.salience.count += sequences
        self.statistics.tokens += batch.tokens

    def _measure_weight(self, index: int, part: str, linear: nn.Linear) -> None:
        sizes = self.statistics.units.layers[index]
        name = module_of(part)
        module = self.statistics.modules[name]
        row, start = module.matrices.index(part), self._offsets[name][index]
        l1, square = weight_norms(linear, sizes, part)
        module.weight_l1[row, start : start + len(l1)] = l1
        module.weight_square[row, start : start + len(l1)] = square


@contextmanager
def collect(
    model: PreTrainedModel,
    spans: Tensor | None = None,
    loss_scale: float = 1.0,
    *,
    checkpoint_layers: bool = False,
    backend: str | None = None,
    coupled: bool = False,
) -> Iterator[Collector]:
    """Collect importance statistics from anybody's loop; yields an object whose ``statistics`` fill up.

        with saap.collect(model, loss_scale=1 / len(ids)) as collected:
            model(input_ids=ids, labels=ids).loss.backward()
        collected.statistics.save("model.stats.safetensors")

    Every forward pass with gradients enabled counts once its backward pass has run. ``spans`` (S, 2) int32
    gives the sequences of each forward as half-open row ranges of the flattened (batch, tokens); None takes
    one sequence per row of the batch, from ``attention_mask`` where there is padding. The method's objective
    is the SUM over sequences of each one's mean loss: ``loss_scale`` is what your loss has in its place, for
    instance 1 / batch size for a mean over equally long rows.

    Additive over any number of backward passes, one per forward; with ``coupled``, LLM-Pruner's coupled
    salience (the absolute value after the mean over sequences) too, for one pass only. Training mode,
    requires_grad and ``.grad`` are left as found, also after an exception. Raises ValueError for models that
    ``discover`` refuses and, naming layer and sequence, for gradients that are not finite; RuntimeError for a
    backward pass that stopped half-way or ran twice, or when none ran at all.
    """
    collector = Collector(
        model,
        discover(model),
        checkpoint_layers=checkpoint_layers,
        backend=backend,
        loss_scale=loss_scale,
        coupled=coupled,
    )
    pending: list[BatchRecord] = []

    def before_forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for batch in [batch for batch in pending if batch.complete]:
            collector.fold(batch)
            pending.remove(batch)
        if torch.is_grad_enabled():
            collector.begin(_spans_of_forward(spans, args, kwargs))
            assert collector.batch is not None  # just begun
            pending.append(collector.batch)

    with collector:
        decoder = model.get_submodule(collector.family.layers.rpartition(".")[0])  # some heads call it directly
        handle = decoder.register_forward_pre_hook(before_forward, with_kwargs=True)
        try:
            yield collector
        finally:
            handle.remove()
        for batch in pending:
            if batch.started:
                collector.fold(batch)
        if not collector.statistics.sequences:
            raise RuntimeError("expected a backward pass inside collect, none reached the model's layers")


def _spans_of_forward(spans: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The caller's spans checked against the batch, or one per row of the batch."""
    ids = args[0] if args else kwargs.get("input_ids")
    shape = kwargs["inputs_embeds"].shape if ids is None else ids.shape
    if spans is None:
        mask = kwargs.get("attention_mask")
        return sequence_spans(torch.ones(shape[:2]) if mask is None else mask)
    saap_kernels.check_spans(spans, shape[0] * shape[1])
    return spans
