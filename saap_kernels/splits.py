"""How many blocks share the columns of a product with few tiles, so that no multiprocessor idles."""

STEPS = 4  # of a pipeline, at the least: shorter parts would only fill and drain it


def split_count(tiles: int, steps: int, wanted: int, enough: int) -> int:
    """Parts into which the ``steps`` along the columns are cut: 1 where there are ``enough`` tiles without.

    A second stage, which adds the parts, costs a launch. Otherwise as many as make ``wanted`` blocks of the tiles, each
    of at least ``STEPS`` steps and none without. A function of the shape and the device alone: the same call is summed
    in the same order.
    """
    if tiles >= enough:
        return 1
    splits = max(1, min(-(-wanted // tiles), steps // STEPS))
    return -(-steps // -(-steps // splits))
