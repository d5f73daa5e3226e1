"""A walk through the blocks that quantises each with error compensation, on what the quantised ones before give it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from saap.blocks import tensors_of
from saap.forward_blocks import ForwardBlocks
from saap.gptq import quantise_weight
from saap.hidden_states import CPU
from saap.least_squares import NormalEquations
from saap.micro_batches import Progress
from saap.quantised_linear import QuantisedLinear
from saap.quantiser import SaapConfig
from saap.stream import Streaming
from saap.undo import Undo
from saap.units import Units
from saap_kernels import PackedWeight

Sums = dict[str, NormalEquations]  # by the first Linear that gets an input; without outputs, so Gram matrices alone


class QuantisingSweep(ForwardBlocks):
    """One walk through the blocks of ids (N, T), which quantises ``linears`` {name: Linear} in place.

    Two passes through each block: one sums the Gram matrices of its Linears' inputs, one makes the inputs of the next
    block with the weights that are quantised by then. ``progress(done, total)`` counts Linears.
    """

    def __init__(
        self, model: PreTrainedModel, units: Units, linears: dict[str, nn.Linear], config: SaapConfig, ids: Tensor,
        streaming: Streaming | None, symmetric: bool, progress: Progress | None,
    ) -> None:  # fmt: skip
        super().__init__(
            model, units, ids, streaming, taken=_gram_bytes(linears), batch_size="auto", progress=None, passes=2
        )
        self.linears, self.config, self.tell, self.home = linears, config, progress, model.device
        self.symmetric = symmetric

    def run(self) -> None:
        """Quantise. ValueError, naming the layer or the weight, leaves the blocks before it quantised."""
        quantised = 0
        self.embed()
        for index, layer in enumerate(self.layers):
            prefix = f"{self.family.layers}.{index}."
            own = {name: linear for name, linear in self.linears.items() if name.startswith(prefix)}
            with self.here(tensors_of(layer)):
                packed = self._quantised(own, *self._sums(index, own))
            for name, weight in packed.items():
                QuantisedLinear.convert(own[name], weight)
                quantised += 1
                if self.tell is not None:
                    self.tell(quantised, len(self.linears))
            if index + 1 < self.count:
                with self.here(tensors_of(layer)):
                    self._go_on(index)

    def _sums(self, index: int, linears: dict[str, nn.Linear]) -> tuple[Sums, dict[str, str]]:
        """Gram matrices of the distinct inputs in one block, and which of them each Linear has: {name: key}."""
        sums: Sums = {}
        keys: dict[str, str] = {}

        def step(rows: slice) -> None:
            with _inputs(linears) as seen:
                self.finite(self.block(index, self.states[0][rows].to(self.device)), index, rows)
            first: dict[int, str] = {}
            keys.update({name: first.setdefault(id(given), name) for name, given in seen.items()})
            found = {}
            for name in first.values():
                given = seen[name].flatten(0, -2).to(self.precision)
                found[name] = NormalEquations.of(given, given[:, :0])
            for name, own in found.items():  # from here on nothing runs out of memory, so nothing is repeated
                sums.setdefault(name, NormalEquations.zeros(len(own.gram), 0, self.device)).merge_(own)

        self.micro_batches(step)
        for each in sums.values():
            each.all_reduce()
        return sums, keys

    def _quantised(self, linears: dict[str, nn.Linear], sums: Sums, keys: dict[str, str]) -> dict[str, PackedWeight]:
        packed = {}
        for name, linear in linears.items():
            gram = sums[keys[name]].gram if name in keys else None  # of one that no token reaches ranges decide
            try:
                weight = quantise_weight(
                    linear.weight.detach(), bits=self.config.bits, group_size=self.config.group_size, clip=True,
                    gram=gram, symmetric=self.symmetric,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{name}.weight: {error}") from error
            packed[name] = weight.to(self.home)
        return packed

    def _go_on(self, index: int) -> None:
        """The block's outputs become the next one's inputs."""

        def step(rows: slice) -> None:
            out = self.finite(self.block(index, self.states[0][rows].to(self.device)), index, rows)
            self.states[0][rows] = out.to(CPU)

        self.micro_batches(step)


@contextmanager
def _inputs(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """{name: input} of the latest forward of each Linear while the context is open; shared ones are one tensor."""
    seen: dict[str, Tensor] = {}
    undo = Undo()

    def watch(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0]

    try:
        for name, linear in linears.items():
            undo.add(linear.register_forward_pre_hook(partial(watch, name)).remove)
        yield seen
    finally:
        undo.restore()


def _gram_bytes(linears: dict[str, nn.Linear]) -> int:
    """Bytes on the device of a block's Gram matrices and of factorising the largest, at most."""
    blocks: dict[str, list[int]] = {}
    for name, linear in linears.items():
        blocks.setdefault(name.split(".layers.")[-1].split(".")[0], []).append(linear.in_features**2)
    # float64 sums, and fp32 ones of a micro-batch; a copy and its factor in float64
    return max((12 * sum(squares) + 16 * max(squares) for squares in blocks.values()), default=0)
