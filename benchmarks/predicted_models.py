"""Whole calibrations in the cost model: the rows of calibrate_model, and block streaming of a 70B model."""

from collections.abc import Iterator

import torch

from benchmarks.calibrate_model import Setting, rows_of
from benchmarks.common import Row
from benchmarks.predicted_kernels import MATMUL_SHARE, Device, launch_bytes, ours, predicted_bytes, weights
from benchmarks.shapes import MODELS, Projection, projections
from benchmarks.weight_salience_rows import Problem

HOST_SECONDS = 5e-6  # of Python and launch per small operation of torch
TINY_OPERATIONS = 300  # of a layer's calibration beyond the model's own: spans, norms of weights, sums to the host
MODEL_OPERATIONS = 150  # of a layer's forward and backward pass
GRADIENT_BYTES = 2  # per gradient that LLM-Pruner's procedure keeps: bf16, as the weights; 4 for fp32 copies
HOST_BANDWIDTH = 10e9  # bytes per second from mapped files through unpinned memory to the device
LLAMA_70B = projections("Llama-2-70B", 8192, 64, 8, 128, 28672)


def in_layer(model: tuple[Projection, ...], sequences: int, length: int) -> list[Problem]:
    """The seven projections of one layer."""
    q, k, o, gate, down = model
    return [Problem(shape, sequences, length) for shape in (q, k, k, o, gate, gate, down)]


def passes(device: Device, count: int, tokens: int, size: float) -> float:
    """Seconds of ``count`` passes over ``size`` bytes of weights, or of gradients: bound by them or by arithmetic."""
    return count * max(device.read(size), size * tokens / (device.flops * MATMUL_SHARE))


def kept_per_token(model: tuple[Projection, ...]) -> float:
    """Bytes that autograd keeps of a block, as saap.memory counts: about 14 hidden sizes and 4 widths."""
    return 2.0 * (14 * model[0].columns + 4 * model[3].rows)


def model_rows(device: Device, tiny: int = TINY_OPERATIONS, gradient: int = GRADIENT_BYTES) -> Iterator[Row]:
    """Llama-2-7B on 10 x 64 tokens in bf16, as calibrate_model: time and memory against every peer of it.

    Every pass reads all weights. ``tiny`` operations of a layer's calibration end in copies to the host, so their
    launches hide nothing. LLM-Pruner's procedure runs one sample at a time, writes all gradients, and squares,
    scales and adds them in tensors of ``gradient`` bytes per weight; then it repeats the passes for the whole
    batch, or (without the second pass) adds up the gradients themselves too.
    """
    model, layers, sequences, length, vocabulary = MODELS["Llama-2-7B"], 32, 10, 64, 32000
    tokens, problems = sequences * length, in_layer(model, sequences, length)
    in_layers = 2.0 * layers * sum(map(weights, problems))
    whole = in_layers + 2.0 * 2 * vocabulary * model[0].columns
    salience = layers * sum(ours(problem, device) for problem in problems)
    partial = max(predicted_bytes(problem, device)["weight_salience"] for problem in problems)
    host, launches = layers * tiny * HOST_SECONDS, layers * MODEL_OPERATIONS * HOST_SECONDS
    one_block, inputs = tokens * kept_per_token(model), layers * tokens * model[0].columns * 2.0
    copies = whole * gradient / 2
    moved = device.read(2 * whole + 5 * copies)  # squared and scaled from gradients, then added
    sample = max(passes(device, 3, length, whole) + moved, launches)
    score = device.read(whole + copies)
    second = max(passes(device, 3, tokens, whole), launches) + score
    middle = {
        "peer": (sequences * sample + second, whole + copies + layers * one_block),
        "peer without second pass": (sequences * (sample + device.read(3 * copies)) + score, whole + 2 * copies),
    }
    for kind, forwards, kept in (("", 1, layers * one_block), (", checkpointing", 2, inputs + one_block)):
        model_pass = max(passes(device, forwards + 1, tokens, whole), launches)
        middle[f"ours{kind}"] = (model_pass + salience + host, kept + partial)
        middle[f"plain{kind}"] = (model_pass + passes(device, 1, tokens, in_layers), kept + in_layers)
    found = {name: {"seconds": seconds, "bytes": size, "weights": whole} for name, (seconds, size) in middle.items()}
    yield from rows_of(found, Setting("Llama-2-7B", {}, sequences, length, torch.bfloat16, sequences), on_gpu=True)


def streamed_rows(device: Device) -> Iterator[Row]:
    """A 70B model, 128 x 512 tokens, one block at a time: each block's weights come from the host twice."""
    layers, sequences, length, batch = 80, 128, 512, 8
    problems = in_layer(LLAMA_70B, sequences, length)
    block = 2.0 * sum(map(weights, problems))
    states = sequences * length * LLAMA_70B[0].columns * 2.0
    compute = passes(device, 3, sequences * length, block) + sum(ours(problem, device) for problem in problems)
    copied = 2 * block + 4 * states  # weights twice; inputs down once and up twice, gradients down and up
    case = f"Llama-2-70B shape, streamed, {sequences} x {length}"
    yield Row.single(f"{case}, time", layers * (compute + copied / HOST_BANDWIDTH), "s")
    yield Row.single(
        f"{case}, share of it in copies", copied / HOST_BANDWIDTH / (compute + copied / HOST_BANDWIDTH), "share"
    )
    on_device = block + batch * length * kept_per_token(LLAMA_70B) + max(map(launch_bytes, problems))
    yield Row.single(f"{case}, device memory", on_device / 2**30, "GiB")
    yield Row.single(f"{case}, device memory / weights", on_device / (layers * block), "ratio", "< 0.1")
