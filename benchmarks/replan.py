"""Re-planning from a saved statistics file at 7B unit counts: load, score, search, write the plan."""

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import Row
from benchmarks.tasks import run
from saap.criteria import score
from saap.search import search
from saap.statistics import Statistics
from saap.units import LayerUnits, Units


def llama_7b_units(layers: int) -> Units:
    layer = LayerUnits(4096, 32, 32, 128, 11008, gated=True)
    blocks = layers * (layer.parameters("attention") + layer.parameters("mlp") + 2 * 4096)
    return Units("llama", (layer,) * layers, blocks + 2 * 32000 * 4096 + 4096, blocks, "0" * 16)


def measure(quick: bool) -> list[Row]:
    statistics = Statistics.zeros(llama_7b_units(4 if quick else 32))
    generator = torch.Generator().manual_seed(0)
    for module in statistics.modules.values():
        module.salience.count = 128
        for tensor in module.tensors().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        statistics.save(path)
        rows.append(Row.single("statistics file of a 7B model", path.stat().st_size / 2**20, "MiB"))
        for method, uniform in (("global", False), ("uniform", False), ("global", True)):
            start = time.perf_counter()
            plan = search(score(Statistics.load(path)), 0.2, method=method, uniform=uniform)
            plan.save(Path(folder) / "plan.json")
            name = f"load, score, search ({method}{', uniform sizes' if uniform else ''}), write plan"
            rows.append(Row.single(name, time.perf_counter() - start, "s", "< 1"))
    return rows


if __name__ == "__main__":
    run(__doc__ or "", measure)
