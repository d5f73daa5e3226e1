"""What every row of calibration_kernels and calibrate_model should be on a GPU, predicted: nothing here was measured.

Data-sheet figures and the assumptions of benchmarks.predicted_kernels and benchmarks.predicted_models; rows are made
by the benchmarks' own functions. Bounds that the prediction misses are printed last. Usage:
``python -m benchmarks.cost_model [--json FILE]``.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.activation_rows import OPERANDS
from benchmarks.calibration_kernels import EXTENTS, ceilings
from benchmarks.common import Row
from benchmarks.predicted_kernels import DEVICES, Device, activations, weight_rows
from benchmarks.predicted_models import model_rows, streamed_rows
from benchmarks.shapes import MODELS, TOKENS
from benchmarks.tasks import Task, run_tasks
from benchmarks.weight_salience_rows import Problem

PREDICTED = "predicted from the assumptions of benchmarks.cost_model, not measured"


def predictions(device: Device, quick: bool) -> Iterator[Row]:
    """Ceilings, every shape and token count of calibration_kernels (quick: of one model), and whole models."""
    yield from ceilings(device.rates)
    for sequences, length in TOKENS:
        for shape in (shape for model in list(MODELS.values())[: 1 if quick else None] for shape in model):
            yield from weight_rows(Problem(shape, sequences, length), device)
    for extent in EXTENTS["cuda"]:
        for op in OPERANDS:
            yield from activations(op, extent, device)
    yield from model_rows(device)
    yield from streamed_rows(device)


def of_device(device: Device, quick: bool) -> Iterator[Row]:
    """The predictions, which say so, under the device's name."""
    for row in predictions(device, quick):
        yield replace(row, case=f"{device.name}: {row.case}", device=PREDICTED)


if __name__ == "__main__":
    run_tasks(
        __doc__ or "",
        lambda args: [Task(device.name, partial(of_device, device, args.quick)) for device in DEVICES],
    )
