"""Least squares for one down projection of a 7B model against one torch.linalg.solve of the whole Gram matrix.

Ours starts from the Gram matrix G of all 11008 inputs and the 4096 x 11008 weight W, with 20 % of the inputs
removed: it forms the right-hand side from the removed columns, damps, factorises the kept part by Cholesky and
solves for the change of 4096 rows, in float64. The peer is one LU solve of G, damped alike, with 4096 right-hand
sides in torch's default fp32: half the work per number, and too few digits for a Gram matrix with less damping.
The last row is the backward elimination of all inputs that compensated scores take, from the same matrix.
"""

import time

import torch
from torch import Tensor

from benchmarks.common import Row
from benchmarks.tasks import run
from benchmarks.timing import interleave
from saap.backward_elimination import costs_in_turn
from saap.least_squares import NormalEquations

ROWS, COLUMNS, TOKENS, REMOVED = 4096, 11008, 4096, 0.2


def gram_matrix(columns: int, tokens: int, device: str) -> Tensor:
    """(F, F) float64 of random correlated inputs."""
    generator = torch.Generator(device).manual_seed(0)
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
    mix = torch.randn(columns, generator=generator, device=device)
    for rows in torch.arange(tokens).split(2048):
        inputs = torch.randn(len(rows), columns, generator=generator, device=device)
        inputs += 0.5 * inputs.roll(1, 1) + torch.randn(len(rows), 1, generator=generator, device=device) * mix
        gram += inputs.T @ inputs
    return gram


def ours(gram: Tensor, weight: Tensor, kept: Tensor, removed: Tensor, tokens: int) -> Tensor:
    """The change (D, K) of the kept columns, float64."""
    stays = gram[kept]
    sums = torch.zeros(len(kept) + len(weight), dtype=torch.float64, device=gram.device)  # not needed without a bias
    known = NormalEquations(
        tokens, stays[:, kept], stays[:, removed] @ weight[:, removed].double().T, *sums.split([len(kept), len(weight)])
    )
    del stays
    return known.solve(1e-3, affine=False)[0]


def measure(quick: bool) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, columns, tokens = (256, 688, 2048) if quick else (ROWS, COLUMNS, TOKENS)
    gram = gram_matrix(columns, tokens, device)
    weight = torch.randn(rows, columns, generator=torch.Generator(device).manual_seed(1), device=device)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(2)).to(device)
    gone = int(REMOVED * columns)
    removed, kept = order[:gone].sort().values, order[gone:].sort().values
    damped = (gram + 1e-3 * gram.diagonal().mean() * torch.eye(columns, device=device)).float()
    sides = weight.T.contiguous()
    variants = {
        "ours": lambda _: ours(gram, weight, kept, removed, tokens),
        "peer": lambda _: torch.linalg.solve(damped, sides),
    }
    seconds = interleave(variants, 3 if quick else 1, 1, device)
    name = f"{rows} x {columns}, {REMOVED:.0%} removed: least squares / torch.linalg.solve fp32"
    found = [Row.compare(name, seconds["ours"], seconds["peer"], "s", "" if quick else "<= 3")]
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    losses = torch.rand(columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = time.perf_counter()
    float(costs_in_turn(gram, weight, losses).sum())  # on the host, so that it is done
    taken = time.perf_counter() - start
    return [*found, Row.single(f"{rows} x {columns}: backward elimination of every input", taken, "s")]


if __name__ == "__main__":
    run(__doc__ or "", measure)
