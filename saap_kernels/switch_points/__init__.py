"""Which path runs an inference op for how many tokens: as measured on the device, or by the rules below.

A path is a backend's kernel or the library's GEMM ("library"), and its rungs are (largest token count, path), in
order; None: no limit. ``python -m saap_kernels.switch_points`` measures them once per device.
"""

from collections.abc import Mapping

import torch

from saap_kernels.library_linear import multiplies
from saap_kernels.packed import PackedWeight
from saap_kernels.switch_points import table
from saap_kernels.switch_points.table import Rungs

LIBRARY = "library"
# Where nothing was measured: up to so many tokens a product is bound by reading the weight, and kernels run.
DECODE_TOKENS = 16
# Above, weights that the library's GEMM reads as they are go there. Those that it would first have to write out again
# (quantised ones, 16-bit ones on a CPU that cannot multiply them) stay with a kernel that takes any number of tokens.
SIZES = (("small", 6 << 20), ("medium", 24 << 20))  # weights of a product: up to a 7B model's k, and its q and o
LARGEST = "large"

_measured: dict[str, Mapping[str, Rungs]] = {}  # by device, as read from the file at the first look-up


def size_class(weight: PackedWeight) -> str:
    """How many weights one product reads, in three classes: what decides how many tokens fill the device."""
    count = weight.rows * weight.columns * (2 if len(weight.shape) == 3 else 1)
    return next((name for name, most in SIZES if count <= most), LARGEST)


def stored_as(weight: PackedWeight) -> str:
    """ "int8", "int4" or the name of the floating-point dtype."""
    return f"int{weight.bits}" if weight.bits != 16 else _name(weight.data.dtype)


def key(op: str, dtype: torch.dtype, weight: PackedWeight) -> str:
    """Of one entry of a device's table, such as "linear bfloat16 int4 large"."""
    return f"{op} {_name(dtype)} {stored_as(weight)} {size_class(weight)}"


def measured(device: torch.device) -> Mapping[str, Rungs]:
    """{kind of product: rungs} of what was measured on this device. The file is read at the first call."""
    name = table.device_name(device)
    if name not in _measured:
        _measured[name] = table.read().get(name, {})
    return _measured[name]


def measured_rungs(op: str, device: torch.device, dtype: torch.dtype, weight: PackedWeight) -> Rungs | None:
    """What was measured for such a product on this device, or None."""
    return measured(device).get(key(op, dtype, weight))


def default_rungs(
    device: torch.device, dtype: torch.dtype, weight: PackedWeight, kernels: Mapping[str, int | None]
) -> Rungs:
    """The rule where nothing was measured; ``kernels``: usable ones, best first, and the most tokens they take.

    ``dtype`` is that of x.
    """
    on_cpu, wide = device.type == "cpu", weight.bits == 16 and weight.data.dtype.itemsize > 2
    if not kernels or (wide and not on_cpu):
        return ((None, LIBRARY),)  # fp32 kernels of GPUs are there to be right; fp64 has none
    first, most = next(iter(kernels.items()))
    decode = (DECODE_TOKENS if most is None else min(DECODE_TOKENS, most), first)
    multiplied = weight.bits == 16 and weight.data.dtype == dtype and (not on_cpu or wide or multiplies(dtype))
    above = next((name for name, most in kernels.items() if most is None), LIBRARY)
    return (decode, (None, LIBRARY if multiplied else above))


def status(device: torch.device | str) -> str:
    """One line: where the switch points of ``device`` were measured, or "not measured: ..." and what to do."""
    found = torch.device(device)
    entry = table.read_entries().get(table.device_name(found))
    if entry is None:
        command = f"python -m saap_kernels.switch_points --device {found.type}"
        return f"not measured: kernels up to {DECODE_TOKENS} tokens, torch's GEMM above; {command} measures them"
    return f"measured with {entry['versions']}, {len(entry['points'])} kinds of products, {table.location()}"


def forget() -> None:
    """Read the file again at the next look-up."""
    from saap_kernels import products

    _measured.clear()
    products.forget()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
