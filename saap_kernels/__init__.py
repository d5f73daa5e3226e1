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

__all__ = [
    "activation_salience",
    "activation_salience_statistics",
    "activation_statistics",
    "available_backends",
    "check_spans",
    "coupled_salience",
    "use_backend",
    "weight_salience",
    "weight_salience_both",
]
