"""Reading and packing text: every form, and every way it can be wrong."""

import json

import pytest
import torch

from saap.data import check_tokenizer, data_fingerprint, encode, load_documents, pack
from tests.saap.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_txt_documents_are_separated_by_blank_lines(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("one\nstill one\n\n\ntwo\n\n")
    assert load_documents(tmp_path / "t.txt") == ["one\nstill one", "two"]


def test_jsonl_rows_hold_text_or_messages(tmp_path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"text": "a", "source": "x"}, {"messages": messages}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert load_documents(str(tmp_path / "t.jsonl")) == ["a", messages]


def test_iterables_of_str_dict_and_tensors_are_read() -> None:
    ids = torch.arange(5)
    found = load_documents(iter(["a", {"text": "b"}, ids]))
    assert found[:2] == ["a", "b"] and torch.equal(found[2], ids)


def test_text_is_encoded_with_the_special_tokens_of_its_tokenizer() -> None:
    ids = encode(TOKENIZER, "ab")
    assert ids.tolist() == [0, *TOKENIZER.convert_tokens_to_ids(["a", "b"])]


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "ab"}]
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        encode(tokenizer, messages)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    assert tokenizer.decode(encode(tokenizer, messages)).endswith("ab.")


def test_packing_joins_shuffled_documents_and_drops_the_tail() -> None:
    documents = ["a" * 9, "b" * 9, "c" * 9]
    packed = pack(TOKENIZER, documents, samples=2, seq_len=12, seed=3)
    assert packed.shape == (2, 12) and packed.dtype == torch.int64
    whole = [tuple(encode(TOKENIZER, d).tolist()) for d in documents]
    assert tuple(packed.flatten()[:10].tolist()) in whole and tuple(packed.flatten()[10:20].tolist()) in whole
    assert torch.equal(packed, pack(TOKENIZER, documents, samples=2, seq_len=12, seed=3))
    orders = {tuple(pack(TOKENIZER, documents, samples=2, seq_len=12, seed=s).flatten().tolist()) for s in range(9)}
    assert len(orders) > 1
    assert data_fingerprint(packed) != data_fingerprint(packed + 1)


def test_token_tensors_keep_their_order() -> None:
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(pack(None, ids, samples=2, seq_len=6, seed=5), ids)


class Elsewhere(torch.Tensor):
    """Token ids on a device: numpy refuses them, ``cpu`` brings them over."""

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *args, **kwargs):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("rows", [False, True])
def test_token_ids_on_a_device_are_packed_on_the_cpu(rows: bool) -> None:
    ids = torch.arange(12).view(2, 6)
    there = ids.as_subclass(Elsewhere)
    packed = pack(None, list(there) if rows else there, samples=2, seq_len=6)
    assert type(packed) is torch.Tensor
    assert data_fingerprint(packed) == data_fingerprint(pack(None, list(ids) if rows else ids, samples=2, seq_len=6))


def test_too_little_text_names_tokens_needed_and_found() -> None:
    with pytest.raises(ValueError, match="4 samples of 8 tokens need 32 tokens, found 20"):
        pack(TOKENIZER, ["a" * 9, "b" * 9], samples=4, seq_len=8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"expected calibration or evaluation text, got none; text can be\n  a .txt file"),
        (5, "cannot read text from int"),
        ("corpus.csv", "cannot read text from 'corpus.csv'"),
        ([], "found no document"),
        (["a", 3], r"data\[1\]: expected a string"),
        ([{"content": "x"}], r"data\[0\]: expected a string"),
        (torch.ones(2, 3), "data: expected 1-D integer token ids, got torch.float32"),
    ],
)
def test_bad_data_is_named(data, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_documents(data)


def test_bad_rows_name_file_and_line(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"t.jsonl:2: not valid JSON"):
        load_documents(path)
    path.write_text('{"text": "a"}\n\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"t.jsonl:3: expected a string"):
        load_documents(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_documents(tmp_path / "absent.txt")


def test_hub_data_offline_shows_the_file_forms(monkeypatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is an optional extra")

    def offline(*_args, **_kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"cannot load hub:some/set: offline\nwithout the hub, text can be"):
        load_documents("hub:some/set")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *config, split: [{"text": f"{name} {config} {split}"}])
    assert load_documents("hub:some/set:en") == ["some/set ('en',) train"]


def test_missing_and_mismatching_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a tokenizer for text, got none"):
        pack(None, ["text"], samples=1, seq_len=2)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="it has 65 tokens, the model 64 embeddings"):
        check_tokenizer(tiny_model("llama"), tokenizer)
