"""GPU kernels where users put them: on streams of their own, on a second device, in captured graphs."""

import pytest
import torch

import saap_kernels as K
from saap_kernels.schedule import CACHED_SCHEDULES
from tests.kernels.test_calibration_ops import problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OPS = {
    "weight_salience": lambda x, dy, w, spans: K.weight_salience(x, dy, w, spans, axis="out"),
    "coupled_salience": lambda x, dy, w, spans: K.coupled_salience(x, dy, w, spans, axis="in"),
    "activation_statistics": lambda x, dy, w, spans: K.activation_statistics(x, spans),
    "activation_salience_statistics": lambda x, dy, w, spans: K.activation_salience_statistics(x, x, spans)[1],
}
every_op = pytest.mark.parametrize("op", list(OPS))
every_backend = pytest.mark.parametrize("backend", ["triton", "cuda"])


def operands(device: str) -> tuple[torch.Tensor, ...]:
    x, dy, w, _, spans = problem(300, 96, 64, torch.bfloat16)
    return (*(tensor.contiguous().to(device) for tensor in (x, dy, w)), spans)


@every_backend
@every_op
def test_an_op_runs_on_the_current_stream(op: str, backend: str) -> None:
    x, dy, w, spans = operands("cuda")
    late = torch.zeros_like(x)
    with K.use_backend(backend):
        wanted = OPS[op](x, dy, w, spans)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(200_000_000)  # about a tenth of a second: a kernel elsewhere would see zeros
            late.copy_(x)
            got = OPS[op](late, dy, w, spans)
        torch.cuda.synchronize()
    assert torch.equal(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_backend
@every_op
def test_an_op_runs_on_its_operands_device(op: str, backend: str) -> None:
    with K.use_backend(backend):
        wanted = OPS[op](*operands("cuda:0"))
        got = OPS[op](*operands("cuda:1"))
    assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), wanted.cpu())  # two of one kind, as machines have them


@every_backend
@every_op
def test_a_captured_op_survives_the_cache_of_schedules(op: str, backend: str) -> None:
    x, dy, w, spans = operands("cuda")
    held = torch.zeros_like(x)
    with K.use_backend(backend):
        wanted = OPS[op](x, dy, w, spans)
        OPS[op](held, dy, w, spans)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = OPS[op](held, dy, w, spans)
        for length in range(1, CACHED_SCHEDULES + 2):  # drops the graph's tables, and writes over their memory
            OPS[op](x, dy, w, torch.tensor([[0, length]], dtype=torch.int32))
    held.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, wanted)
