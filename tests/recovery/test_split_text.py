"""How much of the text is held out, and what is said of it."""

import json
import warnings

import pytest
import torch

from saap.recovery.recover import settled
from saap.recovery.split_text import default_held_out, texts
from tests.recovery.test_cli_recover import recover, workplace  # noqa: F401
from tests.recovery.test_recover import SMALL, ids, pruned, recovered


def sizes(sequences: int, held_out=None, **changes) -> tuple[int, int]:
    text, kept = texts(pruned(), None, ids(sequences), held_out, settled(SMALL | changes, False))
    return len(text), 0 if kept is None else len(kept)


def test_by_default_sixteen_sequences_or_a_quarter_are_held_out() -> None:
    assert sizes(40) == (30, 10) and sizes(64) == (48, 16) and sizes(100) == (84, 16)
    assert sizes(400) == (380, 20)  # 5 %
    assert sizes(4) == (3, 1) and sizes(3) == (3, 0)
    assert [default_held_out(each) for each in (0, 3, 8, 63, 64, 320, 340, 1000)] == [0, 0, 2, 15, 16, 16, 17, 50]


@pytest.mark.parametrize("tokens", [64, 320, 1000, 1024, 6400])
def test_a_budget_is_trained_on_whole_beside_what_is_held_out(tokens: int) -> None:
    trained, kept = sizes(600, tokens=tokens)
    assert 0 <= trained * 16 - tokens < 16
    assert kept == (16 if tokens < 6400 else 21)  # 5 % of what is read


def test_a_text_that_a_budget_uses_up_gives_a_quarter() -> None:
    assert sizes(40, tokens=640) == (30, 10) and sizes(40, tokens=160) == (10, 10)


def test_the_share_is_the_end_of_the_text_in_whole_sequences() -> None:
    model, settings = pruned(), settled(SMALL, False)
    text, kept = texts(model, None, ids(40), 0.05, settings)
    assert torch.equal(text.input_ids, ids(40)[:38]) and torch.equal(kept.input_ids, ids(40)[38:])
    assert sizes(9, 0.05) == (9, 0)  # 0.45 sequences are none
    assert sizes(9, ids(3, seed=1)) == (9, 3) and sizes(9, 0) == (9, 0)
    text, kept = texts(model, None, ids(40), 0.5, settled(SMALL | {"tokens": 128}, False))
    assert len(text) * 16 >= 128 and len(text) + len(kept) < 40  # what is behind is not read


@pytest.mark.parametrize(
    ("sequences", "held_out", "message"),
    [
        (24, None, "^6 sequences are held out, fewer than 16: which step is taken, and when training stops, goes by"),
        (24, 0.05, "^1 sequence is held out, fewer than 16"),
        (24, ids(15, seed=1), "^15 sequences are held out"),
        (3, None, "^no sequence is held out, fewer than 16: the last step is taken"),
        (9, 0.001, "^no sequence is held out, fewer than 16: the last step is taken"),
    ],
)
def test_few_held_out_sequences_are_warned_of(sequences: int, held_out, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        recovered(data=ids(sequences), held_out=held_out, epochs=0.2)


@pytest.mark.parametrize("held_out", [0, 0.0, ids(16, seed=1)])
def test_enough_of_them_and_none_asked_for_are_not(held_out) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recovered(held_out=held_out, tokens=64)


def test_the_command_says_how_many_are_held_out_before_it_trains(workplace, tmp_path) -> None:  # noqa: F811
    asked = ("--out", tmp_path / "out", "--dry-run", "--json")
    for options, warned in ((("--held-out", 0.02), True), ((), False), (("--held-out", 0), False)):
        result = recover(workplace, *asked, *options)
        found = json.loads(result.stdout)
        trained, held = found["sequences"], found["held_out_sequences"]
        assert f"{trained} sequences of 16 tokens to train on, {held} held out" in result.stderr
        assert ("warning: " in result.stderr) is warned and (held == 0) is (options == ("--held-out", 0))
