"""The edges of tests/kernels/edges.py on the backends that run on the CPU as they are."""

import contextlib
import functools
import re

import pytest
import torch

import saap_kernels as K
from saap_kernels import _ext, activations, backend
from tests.kernels import edges


def runner(backend: str):
    def run(op: str, *arguments, **options) -> torch.Tensor:
        with K.use_backend(backend):
            return getattr(K, op)(*arguments, **options)

    return run


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("edge", edges.EDGES)
def test_edges(edge, backend: str) -> None:
    edge(runner(backend), torch.float32)


@pytest.mark.parametrize("op", ["weight_salience", "coupled_salience"])
def test_no_tokens_is_an_error_that_names_the_spans(op: str) -> None:
    x, dy, w = torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"spans: expected non-empty ranges, got \[0, 0\) at 0"):
        getattr(K, op)(x, dy, w, torch.tensor([[0, 0]], dtype=torch.int32), axis="out")
    with pytest.raises(ValueError, match=r"spans: expected ranges within 0 rows, got \[0, 1\) at 0"):
        getattr(K, op)(x, dy, w, torch.tensor([[0, 1]], dtype=torch.int32), axis="out")


class Native:
    """A compiled module for a device of ours, with what a test plants in it."""

    cuda_built, cuda_archs = True, "80;90a"
    driver, runtime, image_error = 13000, 13000, ""

    def __init__(self, **planted) -> None:
        vars(self).update(planted)

    def cuda_versions(self) -> tuple[int, int]:
        return self.driver, self.runtime

    def cuda_image_error(self) -> str:
        return self.image_error


@pytest.fixture
def machine_with(monkeypatch):
    """A machine with a compiled module (None: without) and a CUDA device of capability 10.0, or no device."""

    def plant(module: Native | None, device: bool = True) -> None:
        found = (None, "the compiled module is not there (planted)") if module is None else (module, "ok")
        monkeypatch.setattr(_ext, "_load", lambda: found)
        monkeypatch.setattr(_ext, "cuda_status", functools.cache(_ext.cuda_status.__wrapped__))
        monkeypatch.setattr(_ext, "triton_status", lambda: (False, "triton is not installed"))
        monkeypatch.setattr(backend, "warn_of_reference", functools.cache(backend.warn_of_reference.__wrapped__))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))

    return plant


NO_IMAGE = "no kernel image is available for execution on the device"
REFUSALS = [
    (None, True, "the compiled module is not there (planted)"),
    (Native(cuda_built=False), True, "built without CUDA: nvcc was not found, or SAAP_BUILD_CUDA=0"),
    (Native(), False, "no CUDA device or driver that this torch can use"),
    (
        Native(driver=12080),
        True,
        "built with CUDA 13.0, which needs a driver for CUDA 13.0 or newer; found one for CUDA 12.8",
    ),
    (Native(image_error=NO_IMAGE), True, f"built for sm_80, sm_90a; device 0 is sm_100 ({NO_IMAGE})"),
]


@pytest.mark.parametrize(
    ("module", "device", "reason"), REFUSALS, ids=["absent", "without", "device", "driver", "image"]
)
def test_a_cuda_part_that_cannot_run_is_one_line_and_the_next_backend_runs(
    monkeypatch, machine_with, module, device, reason
) -> None:
    machine_with(module, device)
    assert K.available_backends()["cuda"] == reason
    with pytest.raises(RuntimeError, match=f"cuda cannot run here: {re.escape(reason)}"), K.use_backend("cuda"):
        pass
    monkeypatch.setenv("SAAP_BACKEND", "cuda")
    x = torch.ones(2, 4, dtype=torch.float16)
    spans = torch.tensor([[0, 2]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"SAAP_BACKEND: cuda cannot run here: {re.escape(reason)}"):
        K.activation_salience(x, x, spans)
    monkeypatch.delenv("SAAP_BACKEND")
    assert K.activation_salience(x, x, spans).tolist() == [[2.0] * 4]
    with pytest.warns(UserWarning, match=re.escape(f"triton: triton is not installed; cuda: {reason}")) as warned:
        for _ in range(2):
            assert backend.choose("an_op", activations.IMPLEMENTED, OnDevice()) == "reference"
    assert len(warned) == 1


class OnDevice:
    """What the choice of a backend asks of a CUDA tensor."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype


def test_a_driver_of_the_same_major_version_and_a_device_with_code_run_the_cuda_part(machine_with) -> None:
    machine_with(Native(driver=13000, runtime=13020))
    assert _ext.cuda_status() == _ext.cuda_status(0) == (True, "ok")
    assert backend.choose("an_op", activations.IMPLEMENTED, OnDevice()) == "cuda"
    with pytest.warns(UserWarning, match="plain torch, many times slower: .*cuda: takes .*, got torch.float64"):
        assert backend.choose("an_op", activations.IMPLEMENTED, OnDevice(torch.float64)) == "reference"


def test_a_second_device_without_code_is_refused_where_the_first_one_runs(monkeypatch, machine_with) -> None:
    current: list[int] = [0]

    @contextlib.contextmanager
    def device(index: int):
        current.append(index)
        yield
        current.pop()

    class TwoDevices(Native):
        def cuda_image_error(self) -> str:
            return NO_IMAGE if current[-1] == 1 else ""

    machine_with(TwoDevices())
    monkeypatch.setattr(torch.cuda, "device", device)
    second = OnDevice()
    second.device = torch.device("cuda", 1)
    with K.use_backend("cuda"):
        assert backend.choose("an_op", activations.IMPLEMENTED, OnDevice()) == "cuda"
        with pytest.raises(RuntimeError, match="an_op: cuda cannot run on cuda:1: built for sm_80, sm_90a; device 1"):
            backend.choose("an_op", activations.IMPLEMENTED, second)
    with pytest.warns(UserWarning, match="device 1 is sm_100"):
        assert backend.choose("an_op", activations.IMPLEMENTED, second) == "reference"


def test_tensors_on_the_cpu_ask_no_device(monkeypatch, machine_with) -> None:
    machine_with(Native())
    monkeypatch.setattr(_ext, "cuda_status", lambda device=None: pytest.fail("asked a device"))
    x = torch.ones(2, 4)
    assert backend.choose("an_op", activations.IMPLEMENTED, x) == "cpu"
    with K.use_backend("reference"):
        pass


def test_far_offsets_touch_only_the_pages_of_their_rows() -> None:
    from benchmarks.common import anonymous_bytes, peak_memory

    with peak_memory(anonymous_bytes) as peak:
        edges.offsets_past_2_to_the_31(runner("cpu"), torch.float32)
    assert peak() < 1 << 30  # the storage spans 10 GiB
