"""How many blocks share the columns of a product with few tiles, so that no multiprocessor idles."""

STEPS = 4  # of a pipeline, at the least: shorter parts would only fill and drain it


def split_count(tiles: int, steps: int, processors: int, per_processor: int = 1) -> int:
    """Parts into which the ``steps`` along the columns are cut: 1 where ``tiles`` blocks keep the device busy.

    That is where they fill half of ``per_processor`` blocks on each of its ``processors``: a second stage that adds
    the parts costs a launch, and half of the multiprocessors draw most of the memory's bandwidth. Otherwise so many
    that they fill it, of at least ``STEPS`` steps each. A function of the shape and the device alone: the same call
    is summed in the same order.
    """
    wanted = processors * per_processor
    if 2 * tiles >= wanted:
        return 1
    return max(1, min(-(-wanted // tiles), steps // STEPS))
