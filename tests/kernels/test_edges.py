"""The edges of tests/kernels/edges.py on the backends that run on the CPU as they are."""

import functools

import pytest
import torch

import saap_kernels as K
from saap_kernels import _ext
from tests.kernels import edges


def runner(backend: str):
    def run(op: str, *arguments, **options) -> torch.Tensor:
        with K.use_backend(backend):
            return getattr(K, op)(*arguments, **options)

    return run


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("edge", [edges.one_token, edges.zero_gradient, edges.offsets_past_2_to_the_31])
def test_edges(edge, backend: str) -> None:
    edge(runner(backend), torch.float32)


@pytest.mark.parametrize("op", ["weight_salience", "coupled_salience"])
def test_no_tokens_is_an_error_that_names_the_spans(op: str) -> None:
    x, dy, w = torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"spans: expected non-empty ranges, got \[0, 0\) at 0"):
        getattr(K, op)(x, dy, w, torch.tensor([[0, 0]], dtype=torch.int32), axis="out")
    with pytest.raises(ValueError, match=r"spans: expected ranges within 0 rows, got \[0, 1\) at 0"):
        getattr(K, op)(x, dy, w, torch.tensor([[0, 1]], dtype=torch.int32), axis="out")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "the compiled module is not there"),
        (False, "built without CUDA: nvcc was not found, or SAAP_BUILD_CUDA=0"),
        (True, "no CUDA device or driver that this torch can use"),
    ],
)
def test_a_missing_cuda_part_is_one_line_and_the_next_backend_runs(monkeypatch, module, reason: str) -> None:
    """None: nothing compiled; False: compiled without CUDA; True: with it, but no driver."""

    class Native:
        cuda_built = module

    found = (None, "the compiled module is not there (planted)") if module is None else (Native, "ok")
    monkeypatch.setattr(_ext, "_load", lambda: found)
    monkeypatch.setattr(_ext, "cuda_status", functools.cache(_ext.cuda_status.__wrapped__))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=f"cuda cannot run here: {reason}"), K.use_backend("cuda"):
        pass
    monkeypatch.setenv("SAAP_BACKEND", "cuda")
    x = torch.ones(2, 4, dtype=torch.float16)
    spans = torch.tensor([[0, 2]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"SAAP_BACKEND: cuda cannot run here: {reason}"):
        K.activation_salience(x, x, spans)
    monkeypatch.delenv("SAAP_BACKEND")
    assert K.activation_salience(x, x, spans).tolist() == [[2.0] * 4]


def test_far_offsets_touch_only_the_pages_of_their_rows() -> None:
    from benchmarks.common import anonymous_bytes, peak_memory

    with peak_memory(anonymous_bytes) as peak:
        edges.offsets_past_2_to_the_31(runner("cpu"), torch.float32)
    assert peak() < 1 << 30  # the storage spans 10 GiB
