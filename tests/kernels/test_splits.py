"""Into how many parts the columns of a product are cut."""

import pytest

from saap_kernels.splits import STEPS, split_count


@pytest.mark.parametrize("wanted", [1, 108, 132, 264])
@pytest.mark.parametrize("steps", [1, 3, 4, 17, 1000])
@pytest.mark.parametrize("tiles", [1, 16, 65, 66, 67, 500])
def test_parts_fill_the_device_and_are_worth_their_start(tiles, steps, wanted):
    for enough in (-(-wanted // 2), wanted):
        splits = split_count(tiles, steps, wanted, enough)
        longest = -(-steps // splits)
        assert splits == 1 or longest >= STEPS
        assert (splits - 1) * longest < steps  # none is left without a step
        if tiles >= enough:
            assert splits == 1
        elif steps >= STEPS * wanted:
            even = -(-steps // -(-wanted // tiles))  # steps of a part if there were as many parts as make the blocks
            assert longest == even and (splits - 1) * tiles < wanted


def test_half_a_device_may_be_enough():
    assert split_count(66, 32, 132, 66) == 1 and split_count(66, 32, 132, 132) == 2
    assert split_count(172, 32, 264, 264) == 2 and split_count(264, 32, 264, 264) == 1
    assert split_count(64, 32, 264, 264) == 5  # of seven steps at most
    assert split_count(1, 3, 264, 264) == 1  # too short to share
    assert split_count(1, 4096, 264, 264) == 256
