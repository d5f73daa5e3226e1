"""Into how many parts the columns of a product are cut."""

import pytest

from saap_kernels.splits import STEPS, split_count


@pytest.mark.parametrize("processors", [1, 108, 132])
@pytest.mark.parametrize("steps", [1, 3, 4, 17, 1000])
@pytest.mark.parametrize("tiles", [1, 16, 65, 66, 67, 500])
def test_parts_fill_the_device_and_are_worth_their_start(tiles, steps, processors):
    splits = split_count(tiles, steps, processors)
    assert splits == 1 or steps // splits >= STEPS
    if 2 * tiles >= processors:
        assert splits == 1  # half of the multiprocessors have work: no second stage
    elif steps >= STEPS * processors:
        assert splits * tiles >= processors > (splits - 1) * tiles


def test_more_blocks_for_each_multiprocessor():
    assert split_count(16, 1000, 132) == 9 and split_count(16, 1000, 132, per_processor=2) == 17
