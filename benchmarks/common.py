"""What every benchmark shares: rows and their table, processes of variants, peak memory, and the shipped model."""

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import eq, ge, le, lt
from pathlib import Path

import torch

CASE_WIDTH = 84
SMALL_MODEL = Path(__file__).parent / "small_model"


@dataclass(frozen=True)
class Row:
    """One comparison: ``ratio`` is ours / peer, both in ``unit``; ``asked`` is the bound on the ratio or on ours."""

    case: str
    ours: float
    peer: float | None
    ratio: float | None
    unit: str
    device: str
    asked: str = ""

    @property
    def missed(self) -> bool:
        """Whether something is asked and the ratio, or ours where there is no peer, does not keep to it."""
        if not self.asked:
            return False
        bound, value = self.asked.split(), self.ours if self.ratio is None else self.ratio
        return not {"<=": le, "<": lt, ">=": ge, "==": eq}[bound[0]](value, float(bound[1]))

    @classmethod
    def compare(cls, case: str, ours: float, peer: float, unit: str, asked: str = "") -> "Row":
        return cls(case, ours, peer, ours / peer, unit, device_name(), asked)

    @classmethod
    def single(cls, case: str, ours: float, unit: str, asked: str = "") -> "Row":
        return cls(case, ours, None, None, unit, device_name(), asked)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure_in_processes(
    module: str, variants: Sequence[str], quick: bool, repeats: int
) -> dict[str, dict[str, float]]:
    """Run each variant of ``module`` (see ``run_or_measure``) in its own processes, alternating; medians by variant."""
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(1 if quick else repeats):
        for variant in variants:
            command = [sys.executable, "-m", f"benchmarks.{module}", "--variant", variant, *(["--quick"] * quick)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800)
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{variant}: {results[variant][-1]['seconds']:.2f} s", file=sys.stderr)
    return {v: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for v, rows in results.items()}


def print_header() -> None:
    print(f"\n{'case':{CASE_WIDTH}} {'ours':>10} {'peer':>10} {'ratio':>7}  unit     asked", flush=True)


def print_row(row: Row) -> None:
    peer = "" if row.peer is None else f"{row.peer:.3f}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    print(f"{row.case:{CASE_WIDTH}} {row.ours:10.3f} {peer:>10} {ratio:>7}  {row.unit:8} {row.asked}", flush=True)


def print_missed(rows: Sequence[Row]) -> None:
    """The rows that do not keep to what is asked of them, again and last, where a long table would hide them."""
    asked, missed = sum(bool(row.asked) for row in rows), [row for row in rows if row.missed]
    print(f"\n{len(missed)} of {asked} asked rows missed")
    for row in missed:
        value = f"{row.ours:.3f} {row.unit}" if row.ratio is None else f"{row.ratio:.3f} of the peer's {row.unit}"
        print(f"{row.case:{CASE_WIDTH}} {value}, asked {row.asked}")


def resident_bytes() -> int:
    """Resident memory of this process, from the kernel."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def anonymous_bytes() -> int:
    """Anonymous memory of this process (RssAnon): what the system cannot drop and read again from a file."""
    return _status_bytes("RssAnon")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


@contextmanager
def peak_memory(read: Callable[[], int] = resident_bytes, interval: float = 0.005) -> Iterator[Callable[[], int]]:
    """Sample ``read``; the yielded function gives the peak above the start, in bytes."""
    start = highest = read()
    stop = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.is_set():
            highest = max(highest, read())
            time.sleep(interval)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: highest - start
    finally:
        stop.set()
        thread.join()


@contextmanager
def highest_resident() -> Iterator[Callable[[], int]]:
    """The system's own high-water mark of resident memory above the start, for calls too short to sample.

    Blocks that the C library kept from earlier calls are handed back first, or they would hide what is taken.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again at what is resident now
    start = _status_bytes("VmHWM")
    yield lambda: _status_bytes("VmHWM") - start


@contextmanager
def peak_of_device(device: str) -> Iterator[Callable[[], int]]:
    """Peak memory above the start: the CUDA allocator's, or this process's resident memory."""
    if device != "cuda":
        with peak_memory() as peak:
            yield peak
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - start
