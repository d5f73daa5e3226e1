"""A table of measured latencies of attention and MLP by size, per device: what a latency budget is counted in."""

import json
import os
import platform
import re
import warnings
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from saap.plan import write_atomically
from saap.units import MODULES, Units

LATENCY_FORMAT = 1


def device_name() -> str:
    """The CUDA device, or this machine's processor and torch's number of threads on it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The processor's model where the system names it, otherwise its architecture."""
    file = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.exists() else []
    return models[0].strip() if models else platform.processor() or platform.machine()


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one layer's attention by KV heads and of its MLP by width, measured on ``device``.

    ``attention`` and ``mlp`` are ascending (size, seconds) points; between them times are interpolated, below
    the smallest they fall to 0 at size 0. ``rest`` is the model without its layers. Each is for one forward
    pass of ``tokens`` new tokens with ``context`` tokens in the cache, in ``dtype``. ``benchmarks.latency_table``
    measures one.
    """

    device: str
    dtype: str
    tokens: int
    context: int
    hidden_size: int
    head_dim: int
    group: int  # query heads per KV head
    gated: bool
    attention: tuple[tuple[int, float], ...]
    mlp: tuple[tuple[int, float], ...]
    rest: float

    def __post_init__(self) -> None:
        for module in MODULES:
            points = getattr(self, module)
            sizes = [size for size, _ in points]
            if not points or sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
                raise ValueError(f"latency table: expected ascending sizes of {module}, got {sizes}")
            if any(not seconds > 0 for _, seconds in points) or not self.rest >= 0:
                raise ValueError(f"latency table: expected positive seconds for {module} and rest, got {points}")

    def seconds(self, module: str, sizes: Tensor) -> Tensor:
        """Interpolated seconds of one layer's ``module`` with ``sizes`` (n,) units; (n,) float64.

        Raises ValueError for sizes beyond the largest that was measured.
        """
        points = torch.tensor([(0.0, 0.0), *getattr(self, module)], dtype=torch.float64)
        at, times = points.T.contiguous()
        sizes = sizes.double()
        if len(sizes) and sizes.max() > at[-1]:
            raise ValueError(
                f"latency table: measured up to {int(at[-1])} {module} units, the model has {int(sizes.max())}"
            )
        right = torch.searchsorted(at, sizes).clamp(1, len(at) - 1)
        share = (sizes - at[right - 1]) / (at[right] - at[right - 1])
        return torch.lerp(times[right - 1], times[right], share)

    def check_units(self, units: Units) -> None:
        """Raise ValueError unless the table was measured with the shapes of this model."""
        for layer in units.layers:
            if layer.experts:
                raise ValueError("latency tables are of dense MLPs, the model is a mixture of experts: use parameters, "
                                 "macs or bytes")  # fmt: skip
            for name in ("hidden_size", "head_dim", "group", "gated"):
                if name == "group" and not layer.kv_heads:
                    continue  # of an attention that is gone
                if getattr(layer, name) != getattr(self, name):
                    raise ValueError(
                        f"this latency table was measured with {name} {getattr(self, name)}; "
                        f"the model has {getattr(layer, name)}"
                    )
            for module in MODULES:
                self.seconds(module, torch.tensor([layer.count(module)]))

    def check_device(self, device: str = "this") -> None:
        """Raise ValueError unless measured on ``device``: "this" machine, another by its name, or "any"."""
        here = device == "this"
        wanted = device_name() if here else device
        if device != "any" and wanted != self.device:
            raise ValueError(
                f"this latency table was measured on {self.device!r}, expected {wanted!r}"
                f"{', this machine' if here else ''}; name the device to plan for (device=, --latency-device), or any"
            )

    def warn_of_dtype(self, dtype: torch.dtype) -> None:
        """Warn when the table is of another dtype than a model's: its times hold for serving in the table's."""
        name = str(dtype).removeprefix("torch.")
        if name != self.dtype:
            warnings.warn(
                f"this latency table was measured in {self.dtype}, the model is in {name}: the budget holds when the "
                f"pruned model is served in {self.dtype}",
                stacklevel=4,  # whoever called prune
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically."""
        write_atomically(Path(path), json.dumps({"format": LATENCY_FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "this") -> "LatencyTable":
        """Read what ``save`` wrote, of "this" machine unless ``device`` says otherwise.

        ``device`` is another's name, as its ``device_name()`` gave it, to plan for that one, or "any". Raises
        ValueError for other files and for a table of another device.
        """
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            if body.pop("format") != LATENCY_FORMAT:
                raise ValueError(f"{path}: expected latency table format {LATENCY_FORMAT}")
            points = {
                module: tuple((int(size), float(seconds)) for size, seconds in body[module]) for module in MODULES
            }
            table = cls(**body | points)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks or misshapes a field of a latency table: {error}") from error
        table.check_device(device)
        return table
