"""Additive sums of a least-squares problem over tokens, and its damped solution."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saap.distributed import sum_over_ranks

RAISES = 6  # how often damping grows tenfold before a matrix is given up


@dataclass
class NormalEquations:
    """Inputs x (K,) that a Linear keeps, and what its outputs lack, r (D,): sums over tokens.

    ``gram`` (K, K) is the sum of x x', ``cross`` (K, D) of x r', ``inputs`` (K,) of x and ``residual`` (D,) of r.
    Micro-batches are multiplied in fp32 (float64 models in float64) and added up in float64: a product of a
    few thousand tokens rounds by about 1e-6, far below any damping, while the long sum would go on losing digits.
    """

    tokens: int
    gram: Tensor
    cross: Tensor
    inputs: Tensor
    residual: Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> "NormalEquations":
        """No tokens yet of ``inputs`` features and ``outputs`` features; float64 on ``device``."""
        shapes = (inputs, inputs), (inputs, outputs), (inputs,), (outputs,)
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @classmethod
    def of(cls, inputs: Tensor, residual: Tensor) -> "NormalEquations":
        """Sums of one micro-batch; inputs (T, K) and residual (T, D) in fp32 or float64."""
        sums = (rows.sum(0, dtype=torch.float64) for rows in (inputs, residual))
        return cls(len(inputs), inputs.T @ inputs, inputs.T @ residual, *sums)

    def merge_(self, other: "NormalEquations") -> None:
        """Add the tokens of ``other``; writes into this object's tensors."""
        self.tokens += other.tokens
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine += theirs

    def all_reduce(self) -> None:
        """The tokens of all ranks together, equal on every rank; does nothing without a process group."""
        tokens = torch.tensor(self.tokens, device=self.gram.device)
        sum_over_ranks(tokens, *self._tensors())
        self.tokens = int(tokens)

    def finite(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in self._tensors())

    def solve(
        self, damping: float | str, affine: bool, name: str = "the matrix", caution: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The change of weights (D, K) and of bias (D,) that makes up for the residual, float64.

        Minimises sum ||r - dW x - db||^2 + damping * m * ||dW||^2, m the mean of the Gram matrix's diagonal, by
        Cholesky: (G + damping m I) dW' = X'r. ``damping`` "auto" is ``caution`` times K over tokens: the fewer
        tokens speak for an input, the less its weights change. With ``affine`` G and X'r are centred and
        db = mean(r) - dW mean(x), otherwise db is 0. Where inputs are zero, or there are none, nothing changes.
        ``gram`` and ``cross`` are overwritten. A matrix that is singular in float64 gets tenfold damping, ``RAISES``
        times at most; then, or when it is not finite, ValueError says so, calling it ``name``.
        """
        self._centre(affine, name)
        share = len(self.gram) / self.tokens
        factor = self._factor(caution * share if isinstance(damping, str) else damping, name)
        change = torch.zeros_like(self.cross.T) if factor is None else torch.cholesky_solve(self.cross, factor).T
        mean_inputs, mean_residual = self.inputs / self.tokens, self.residual / self.tokens
        shift = mean_residual - change @ mean_inputs if affine else torch.zeros_like(mean_residual)
        return change, shift

    def damped(self, affine: bool, name: str = "the matrix") -> Tensor | None:
        """The Gram matrix (K, K) as ``solve`` with damping "auto" inverts it, or None where all inputs are zero.

        ``gram`` itself is overwritten.
        """
        self._centre(affine, name)
        return None if self._factor(len(self.gram) / self.tokens, name) is None else self.gram

    def _centre(self, affine: bool, name: str) -> None:
        if not self.finite():
            raise ValueError(f"expected finite inputs and outputs, found NaN or inf in those of {name}")
        if affine:
            self.gram.addr_(self.inputs, self.inputs / self.tokens, alpha=-1)
            self.cross.addr_(self.inputs, self.residual / self.tokens, alpha=-1)

    def _factor(self, damping: float, name: str) -> Tensor | None:
        """The Cholesky factor of the damped Gram matrix; None where there are no inputs, or all of them are zero."""
        diagonal = self.gram.diagonal()
        scale = float(diagonal.mean()) if len(diagonal) else 0.0
        if scale <= 0:
            return None
        added = 0.0
        for power in range(RAISES + 1):
            wanted = damping * 10**power * scale
            diagonal += wanted - added
            added = wanted
            factor, failed = torch.linalg.cholesky_ex(self.gram)
            if not failed and _regular(factor, diagonal):
                return factor
        raise ValueError(
            f"the Gram matrix of {name} stays singular with damping {damping * 10**RAISES:g}, ten to the {RAISES} "
            f"times what was asked for; use a larger damping than {damping:g} or more calibration text"
        )

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.gram, self.cross, self.inputs, self.residual


def _regular(factor: Tensor, diagonal: Tensor) -> bool:
    """Whether every pivot stands above the rounding of the entry that it was computed from."""
    noise = len(diagonal) * torch.finfo(factor.dtype).eps
    return bool((factor.diagonal().square() > noise * diagonal).all())
