"""How many sequences share a launch of the tiled kernels, on the shapes of a large model."""

import pytest
import torch

from saap_kernels import tiled_salience
from saap_kernels.schedule import Spans
from saap_kernels.tiled_salience import Operands

WANT = ["abs", "square", "mixed"]


def launches(rows: int, columns: int, sequences: int, tokens: int) -> list[int]:
    """Sequences of each launch for w (rows, columns) and tiles of 256 entries; nothing is computed."""
    found: list[int] = []
    total, tiles = sequences * tokens, columns // 256
    x, dy, w = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((total, columns), (total, rows), (rows, columns))
    )

    def launch(spans: Spans, slots: list[int]) -> torch.Tensor:
        found.append(len(spans))
        return torch.empty(3, len(spans), tiles, rows, device="meta")

    starts = torch.arange(sequences, dtype=torch.int32) * tokens
    spans = torch.stack([starts, starts + tokens], 1)
    operands = Operands(dy, x, w, rows, columns, columns, 1)
    result = tiled_salience.weight_salience(launch, operands, tiles, dy, spans, 1, None, WANT, 1.0)
    assert result.shape == (3, sequences, rows)
    return found


def test_ten_sequences_of_the_largest_weight_take_one_launch() -> None:
    assert launches(29568, 8192, 10, 64) == [10]
    assert launches(29568, 8192, 45, 128) == [21, 21, 3]  # 21 share one read of w, which is 462 MiB


@pytest.mark.parametrize(("rows", "columns"), [(29568, 8192), (11008, 4096), (512, 4096)])
def test_partial_sums_take_half_of_the_weight_at_most_or_little(rows: int, columns: int) -> None:
    largest = max(launches(rows, columns, 128, 64))
    taken = largest * 3 * (columns // 256) * rows * 4
    assert taken <= max(rows * columns * 2 // 2, tiled_salience.PARTIAL_BYTES)
