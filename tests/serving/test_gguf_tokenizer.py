"""Tokenizers in GGUF files, read back; what llama.cpp makes of them is in ``llamacpp_cases``."""

import json

import gguf
import pytest
from tokenizers import models, normalizers, pre_tokenizers, processors

from benchmarks.common import SMALL_MODEL
from saap.serving.gguf_export import export_gguf
from saap.serving.gguf_tokenizer import LLAMA3, QWEN2, TEKKEN
from tests.serving.gguf_models import VOCABULARY, byte_level_tokenizer, saved, sentencepiece_tokenizer, splitting

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    int(getattr(gguf.TokenType, name)) for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
)


def exported(tmp_path, tokenizer, **overrides) -> dict[str, object]:
    """What the header says of the tokenizer."""
    folder = saved(tmp_path / "model", "llama", tokenizer=tokenizer, **overrides)
    fields = gguf.GGUFReader(export_gguf(folder, tmp_path / "x.gguf", "f16", force=True)).fields
    return {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.")
    }


def test_the_shipped_tokenizer(tmp_path) -> None:
    fields = gguf.GGUFReader(export_gguf(SMALL_MODEL, tmp_path / "x.gguf", "q8_0")).fields
    stored = json.loads((SMALL_MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]

    def field(name):
        return fields[f"tokenizer.ggml.{name}"].contents()

    assert (field("model"), field("pre")) == ("gpt2", "gpt-2")
    assert field("tokens") == sorted(stored["vocab"], key=stored["vocab"].get)
    assert field("merges") == [" ".join(pair) for pair in stored["merges"]]
    assert field("token_type")[:3] == [CONTROL, CONTROL, NORMAL]
    assert (field("bos_token_id"), field("eos_token_id")) == (0, 1)
    assert (field("add_bos_token"), field("add_eos_token")) == (True, False)


@pytest.mark.parametrize(
    "pre, ignore_merges, name",
    [
        (None, False, "gpt-2"),
        (splitting(LLAMA3), True, "llama-bpe"),
        (splitting(LLAMA3), False, "smaug-bpe"),
        (splitting(QWEN2), False, "qwen2"),
        (splitting(TEKKEN), True, "tekken"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            False,
            "smollm",
        ),
    ],
)
def test_the_pre_tokenizer_is_recognised(tmp_path, pre, ignore_merges, name) -> None:
    assert exported(tmp_path, byte_level_tokenizer(pre, ignore_merges))["ggml.pre"] == name


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        splitting(r"\p{L}+|\p{N}+"),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ],
)
def test_unknown_pre_tokenizers_are_refused(tmp_path, pre) -> None:
    with pytest.raises(ValueError, match="llama-bpe.*this tokenizer's is another"):
        exported(tmp_path, byte_level_tokenizer(pre))


def test_rows_without_a_token_are_unused_and_added_ones_are_told_apart(tmp_path) -> None:
    tokenizer = byte_level_tokenizer(size=VOCABULARY - 10)
    tokenizer.add_tokens(["plain"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    found = exported(tmp_path, tokenizer)
    types, tokens = found["ggml.token_type"], found["ggml.tokens"]
    assert types[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert (types[tokens.index("plain")], types[tokens.index("<|end|>")]) == (USER_DEFINED, CONTROL)
    assert len(tokens) == VOCABULARY and types[-1] == UNUSED and tokens[-1] == f"[PAD{VOCABULARY - 1}]"


def test_sentencepieces_scores_follow_the_merges(tmp_path) -> None:
    found = exported(tmp_path, tokenizer := sentencepiece_tokenizer())
    assert (found["ggml.model"], found["ggml.pre"], found["ggml.add_space_prefix"]) == ("llama", "default", True)
    assert found["ggml.token_type"][:5] == [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE]
    assert found["ggml.unknown_token_id"] == 0
    tokens, scores = found["ggml.tokens"], found["ggml.scores"]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    pieces = list(dict.fromkeys(left + right for left, right in merges))
    ordered = sorted(pieces, key=lambda piece: -scores[tokens.index(piece)])
    assert ordered == pieces and min(scores) == scores[tokens.index("<0x41>")] < scores[tokens.index(pieces[-1])]


def test_sentencepieces_tokenizer_with_metaspace(tmp_path) -> None:
    tokenizer = sentencepiece_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    assert exported(tmp_path, tokenizer)["ggml.add_space_prefix"] is False


@pytest.mark.parametrize(
    "scheme, told", [("first", "begins with a space or after a special"), ("always", "with a space$")]
)
def test_spaces_that_llama_cpp_puts_beyond_the_tokenizers_are_told(tmp_path, scheme, told) -> None:
    tokenizer = sentencepiece_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    with pytest.warns(UserWarning, match=told):
        assert exported(tmp_path, tokenizer)["ggml.add_space_prefix"] is True


def test_merges_that_llama_cpp_would_make_beyond_the_tokenizers_are_told(tmp_path) -> None:
    tokenizer = sentencepiece_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    counts: dict[str, int] = {}
    for pair in backend["model"]["merges"]:
        counts["".join(pair)] = counts.get("".join(pair), 0) + 1
    several = next(piece for piece, count in counts.items() if count > 1)
    first = next(i for i, pair in enumerate(backend["model"]["merges"]) if "".join(pair) == several)
    del backend["model"]["merges"][first]
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(backend))
    with pytest.warns(UserWarning, match="1 merges that this tokenizer does not have"):
        exported(tmp_path, tokenizer)


def test_normalisers(tmp_path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.warns(UserWarning, match="NFC"):
        exported(tmp_path, tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="Lowercase"):
        exported(tmp_path, tokenizer)
    pieces = sentencepiece_tokenizer()
    pieces.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ValueError, match="NFKC"):
        exported(tmp_path, pieces)


def test_what_is_put_around_a_text(tmp_path) -> None:
    tokenizer = byte_level_tokenizer()
    bos, eos, turn = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<|turn|>"))
    post = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    tokenizer.backend_tokenizer.post_processor = post
    found = exported(tmp_path, tokenizer)
    assert (found["ggml.add_bos_token"], found["ggml.add_eos_token"]) == (False, True)
    post = processors.TemplateProcessing(single="<|turn|> $A", special_tokens=[("<|turn|>", turn)])
    tokenizer.backend_tokenizer.post_processor = post
    with pytest.raises(ValueError, match=f"with bos {bos} and eos {eos}"):
        exported(tmp_path, tokenizer)


def test_chat_template_and_the_tokens_that_end_a_turn(tmp_path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}"
    folder = saved(tmp_path / "model", "llama", tokenizer=tokenizer)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [1, 2]}))
    fields = gguf.GGUFReader(export_gguf(folder, tmp_path / "x.gguf", "f16")).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert (fields["tokenizer.ggml.eos_token_id"].contents(), fields["tokenizer.ggml.eot_token_id"].contents()) == (
        1,
        2,
    )


def test_ids_that_only_the_configuration_has(tmp_path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.bos_token = tokenizer.eos_token = None
    found = exported(tmp_path, tokenizer, bos_token_id=0, eos_token_id=2)
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"], found["ggml.add_bos_token"]) == (0, 2, False)
    with pytest.raises(ValueError, match="which token ends a text"):
        exported(tmp_path / "other", tokenizer, eos_token_id=None)


def test_tokenizers_that_do_not_fit_the_model(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"a token 499, the model has embeddings for 0 to {VOCABULARY - 1}"):
        exported(tmp_path, byte_level_tokenizer(size=500))


def test_tokenizers_of_other_kinds(tmp_path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.model = models.WordLevel({"a": 0, "<s>": 1}, unk_token="a")
    with pytest.raises(ValueError, match="this one is WordLevel"):
        exported(tmp_path, tokenizer)
    folder = saved(tmp_path / "damaged", "llama", tokenizer=byte_level_tokenizer())
    (folder / "tokenizer.json").write_text('{"model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        export_gguf(folder, tmp_path / "y.gguf", "f16")


def test_a_directory_without_a_tokenizer(tmp_path) -> None:
    with pytest.warns(UserWarning, match="no tokenizer"):
        assert exported(tmp_path, None) == {"ggml.model": "no_vocab"}
