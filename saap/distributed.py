"""Data-parallel calibration: every rank measures its share of the sequences, moments are all-reduced.

We write no launcher: ``torchrun --nproc-per-node N -m saap calibrate ...`` starts the ranks.
"""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from saap.moments import Moments
from saap.statistics import ModuleStatistics, Statistics

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=30)  # one rank may be that much slower than another before the job fails


_joined = itertools.count()  # groups of this process, and of every other that torchrun launched


@cache
def _store() -> tuple[distributed.Store, int, int]:
    """Where the processes find each other, this one's rank and their number."""
    found: tuple[distributed.Store, int, int] = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    return found


@contextmanager
def process_group() -> Iterator[int]:
    """Join the group that torchrun launched, if it did, for the time of the context; yields this process's rank.

    Statistics are small and live on the CPU, so gloo reduces them whatever the model runs on.
    """
    if launched()[1] == 1 or distributed.is_initialized():
        yield rank()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, own, processes = _store()
    # addresses of a group that was left are still in the store: the next one has names of its own
    store = distributed.PrefixStore(f"saap-{next(_joined)}", store)
    distributed.init_process_group(backend, store=store, rank=own, world_size=processes, timeout=TIMEOUT)
    group = distributed.group.WORLD
    try:
        yield rank()
    finally:
        # The threads of a group drop tensors, for which they need the GIL, and end with it. Cycles (DDP's wrapper) hold
        # it: left to the end of the interpreter, a thread still at that aborts the process; destroyed by the collection
        # itself, which keeps the GIL, it waits for its threads for ever. Freed last and from here, it waits without.
        distributed.destroy_process_group()
        gc.collect()
        del group


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes that torchrun started, in a group yet or not; (0, 1) without."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def refuse_ranks(command: str, instead: str) -> None:
    """Raise ValueError when torchrun launched several processes of a command that only one may run."""
    ranks = launched()[1]
    if ranks > 1:
        raise ValueError(f"saap {command} runs in one process, torchrun started {ranks}: {instead}")


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes that share the calibration set; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in the order of ranks: small objects that can be pickled."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def check_agreement(values: dict[str, Any]) -> None:
    """Raise ValueError, on every rank, naming what of ``values`` differs between ranks."""
    everyone = gathered(values)
    differing = [name for name in values if any(other.get(name) != values[name] for other in everyone)]
    if any(gathered(differing)):
        lines = [
            f"{name}: " + ", ".join(f"{other.get(name)!r} in process {index}" for index, other in enumerate(everyone))
            for name in sorted({name for names in gathered(differing) for name in names})
        ]
        raise ValueError("the processes were not started for the same work; " + "; ".join(lines))


def on_first_rank(action: Callable[[], Result]) -> Result:
    """What ``action`` gives on rank 0, where alone it runs, on every rank; an error of it is raised on every rank."""
    if world_size() == 1:
        return action()
    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = action()
        except (ValueError, OSError, RuntimeError) as caught:
            error = caught
    result, error = gathered((result, error))[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]  # of rank 0, through pickle


def check_world(samples: int) -> None:
    """Raise ValueError unless every rank gets a sequence."""
    if samples < world_size():
        raise ValueError(f"expected at least one sequence per process; got {samples} for {world_size()} processes")


def share(ids: Tensor) -> Tensor:
    """This rank's consecutive rows of the packed sequences (N, T); all rows without a process group."""
    return ids if world_size() == 1 else ids.tensor_split(world_size())[rank()]


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks, in place; does nothing without a process group."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def all_reduce(statistics: Statistics) -> None:
    """Replace each rank's statistics by those of all ranks' sequences together, in place and equal on every rank.

    Means are summed weighted by counts, then the deviations about the common mean: the exact merge of
    Chan, Golub and LeVeque (1983). Does nothing without a process group.
    """
    if world_size() == 1:
        return
    if any(module.coupled is not None for module in statistics.modules.values()):
        raise ValueError("coupled statistics are exact for one backward pass only and cannot be all-reduced")
    sequences, tokens = statistics.sequences, statistics.tokens
    total = torch.tensor([sequences, tokens])
    distributed.all_reduce(total)
    all_sequences, all_tokens = (int(value) for value in total)
    for module in statistics.modules.values():
        for means in (module.signed, module.input_activity):
            means.copy_(_mean(means, sequences, all_sequences))
        _reduce_inputs(module, tokens, all_tokens)
        _reduce_moments(module.salience, all_sequences)
    for means in (statistics.influence, statistics.experts):
        means.copy_(_mean(means, tokens, all_tokens))
    statistics.tokens = all_tokens


def _reduce_moments(moments: Moments, total: int) -> None:
    vector = _mean(moments.vector_mean, moments.count, total)
    element = _mean(moments.element_mean, moments.count, total)
    vector_gap, element_gap = moments.vector_mean - vector, moments.element_mean - element
    moments.vector_m2 += moments.count * vector_gap.square()
    moments.element_m2 += moments.count * element_gap.square()
    moments.cross += moments.count * vector_gap[:, None] * element_gap
    for tensor in (moments.vector_m2, moments.element_m2, moments.cross):
        distributed.all_reduce(tensor)
    moments.vector_mean.copy_(vector)
    moments.element_mean.copy_(element)
    moments.count = total


def _reduce_inputs(module: ModuleStatistics, tokens: int, total: int) -> None:
    mean = _mean(module.input_mean, tokens, total)
    module.input_m2 += tokens * (module.input_mean - mean).square()
    distributed.all_reduce(module.input_m2)
    distributed.all_reduce(module.input_absmax, op=distributed.ReduceOp.MAX)
    module.input_mean.copy_(mean)


def _mean(local: Tensor, count: int, total: int) -> Tensor:
    result = local * (count / total)
    distributed.all_reduce(result)
    return result
