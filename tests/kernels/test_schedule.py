"""Tables of token blocks: cached, and told of the streams and graphs that read them."""

import pytest
import torch

from saap_kernels import schedule

CPU = torch.device("cpu")


class DeviceTable:
    """What a CUDA tensor is asked for."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, address: int) -> None:
        self.address, self.streams = address, []

    def data_ptr(self) -> int:
        return self.address

    def record_stream(self, stream: str) -> None:
        self.streams.append(stream)


def test_tables_are_made_once_and_cover_the_spans() -> None:
    spans = ((0, 5), (7, 8))
    table = schedule.masked_blocks(spans, 4, CPU)
    assert table is schedule.masked_blocks(spans, 4, CPU)
    assert table[:-1, :3].tolist() == [[0, 4, -1], [4, 1, 0], [7, 1, 1]]
    whole = schedule.whole_blocks(spans, 4, 9, CPU)
    assert whole[:-1].tolist() == [[0, 4, 0, 4, 1], [9, 4, 1, 7, 1]]  # one token: a block past the end, and a tail
    assert schedule.first_blocks(spans, 4, CPU).tolist() == [0, 2, 3]


def test_a_new_table_inside_a_graph_capture_is_refused_and_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    spans, device = ((0, 5), (7, 11)), torch.device("cuda")
    for build, arguments in (
        (schedule.masked_blocks, (spans, 4, device)),
        (schedule.whole_blocks, (spans, 4, 12, device)),
        (schedule.first_blocks, (spans, 4, device)),
    ):
        with pytest.raises(RuntimeError, match="run the op once with the same spans before the capture"):
            build(*arguments)
    assert schedule.masked_blocks(spans, 4, CPU) is schedule.masked_blocks(spans, 4, CPU)  # nothing to copy


def test_a_table_on_a_device_knows_its_streams_and_outlives_the_cache_in_a_graph(monkeypatch) -> None:
    made: list[DeviceTable] = []

    def build(key: int) -> DeviceTable:
        made.append(DeviceTable(key))
        return made[-1]

    capturing = False
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"side stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(schedule, "_in_graphs", {})
    table = schedule._cached(build)
    table(1)
    assert table(1) is made[0] and made[0].streams == ["side stream of cuda:0"] * 2
    assert not schedule._in_graphs
    capturing = True
    table(1), table(1)
    assert schedule._in_graphs == {1: made[0]}
    capturing = False
    for key in range(2, schedule.CACHED_SCHEDULES + 3):
        table(key)
    assert table(1) is not made[0] and schedule._in_graphs == {1: made[0]}
