"""Kernels for calibrating and running pruned language models; usable without the ``saap`` package."""

from saap_kernels._checks import check_spans
from saap_kernels.backend import available_backends, use_backend
from saap_kernels.calibration import (
    activation_salience,
    activation_salience_statistics,
    activation_statistics,
    coupled_salience,
    weight_salience,
    weight_salience_both,
)
from saap_kernels.inference import gated_linear, gated_mlp, linear
from saap_kernels.packed import PackedWeight, pack, pack_quantised, unpack
from saap_kernels.switch_points.measure import measure_switch_points

__all__ = [
    "PackedWeight",
    "activation_salience",
    "activation_salience_statistics",
    "activation_statistics",
    "available_backends",
    "check_spans",
    "coupled_salience",
    "gated_linear",
    "gated_mlp",
    "linear",
    "measure_switch_points",
    "pack",
    "pack_quantised",
    "unpack",
    "use_backend",
    "weight_salience",
    "weight_salience_both",
]
