"""Re-planning from saved statistics at 7B unit counts: load, score, search, write; every criterion and search."""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row
from benchmarks.evidence_cases import CASES
from benchmarks.tasks import run
from saap.criteria import score
from saap.latency import LatencyTable
from saap.resources import Bytes, Latency, Macs
from saap.search import search
from saap.statistics import COUPLED, Statistics
from saap.units import LayerUnits, Units


def llama_7b_units(layers: int) -> Units:
    layer = LayerUnits(4096, 32, 32, 128, 11008, gated=True)
    blocks = layers * (layer.parameters("attention") + layer.parameters("mlp") + 2 * 4096)
    return Units("llama", (layer,) * layers, blocks + 2 * 32000 * 4096 + 4096, blocks, "0" * 16)


def made_up_latency() -> LatencyTable:
    """A table for those units; as on a GPU, time rises in steps, of 4 heads and 512 channels. Nothing was measured."""
    return LatencyTable(
        device="made up", dtype="bfloat16", tokens=1, context=256,
        hidden_size=4096, head_dim=128, group=1, gated=True,
        attention=tuple((n, 1e-5 + 3e-6 * -(-n // 4)) for n in range(1, 33)),
        mlp=tuple((n, 1e-5 + 4e-6 * -(-n // 512)) for n in range(128, 11009, 128)), rest=1e-3,
    )  # fmt: skip


def made_up_statistics(layers: int) -> Statistics:
    statistics = Statistics.zeros(llama_7b_units(layers))
    statistics.tokens = 128 * 512
    generator = torch.Generator().manual_seed(0)
    for module in statistics.modules.values():
        module.salience.count = 128
        for tensor in module.tensors().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    statistics.influence.copy_(torch.rand(statistics.influence.shape, generator=generator))
    return statistics


SEARCHES: dict[str, dict[str, Any]] = {
    "global": {},
    "standardised": {"method": "standardised"},
    "fluctuation": {"method": "fluctuation"},
    "uniform": {"method": "uniform"},
    "global, uniform sizes": {"uniform": True},
    "global, whole modules may go": {"allow_empty": True},
    "global, multiply-accumulates": {"resource": Macs(context=2048)},
    "global, bytes": {"resource": Bytes(context=2048)},
    "global, latency": {"resource": Latency(made_up_latency())},
    "uniform, latency": {"method": "uniform", "resource": Latency(made_up_latency())},
}


def measure(quick: bool) -> Iterator[Row]:
    statistics = made_up_statistics(4 if quick else 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        statistics.save(path)
        yield Row.single("statistics file of a 7B model", path.stat().st_size / 2**20, "MiB")
        for method, uniform in (("global", False), ("uniform", False), ("global", True)):
            start = time.perf_counter()
            plan = search(score(Statistics.load(path)), 0.2, method=method, uniform=uniform)
            plan.save(Path(folder) / "plan.json")
            name = f"load, score, search ({method}{', uniform sizes' if uniform else ''}), write plan"
            yield Row.single(name, time.perf_counter() - start, "s", "< 1")
    generator = torch.Generator().manual_seed(1)
    for module in statistics.modules.values():  # criteria of the coupled form need it, files need not hold it
        module.coupled = torch.rand(len(COUPLED), *module.signed.shape, generator=generator, dtype=torch.float64)
    saap = partial(score, criterion="saap")
    chosen = {f"score ({case.name}), search": (case.criterion, {}) for case in CASES if case.group == "criteria"}
    chosen |= {f"score, search ({name})": (saap, options) for name, options in SEARCHES.items() if options}
    for name, (criterion, options) in chosen.items():
        start = time.perf_counter()
        search(criterion(statistics), 0.2, **options)
        yield Row.single(name, time.perf_counter() - start, "s", "< 2")


if __name__ == "__main__":
    run(__doc__ or "", measure)
