"""Packing of text to train on, and which tokens of a chat count."""

import pytest
import torch

from saap.recovery.training_text import IGNORED, TrainingText, pack_to_train
from tests.saap.tiny import tiny_model, tiny_tokenizer

# Templates of our own in the shapes that models have.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # Llama 3: a beginning of text, headers, trimmed contents
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message.role }}<|stop|>\n\n"
    "{{ message.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
MERGED = (  # the system message goes into the first question; the end of an answer is the end of text
    "{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content + ' ' %}"
    "{% elif message.role == 'user' %}[INST] {{ ns.system }}{{ message.content }} [/INST]{% set ns.system = '' %}"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # Qwen 3: thoughts before the last question are dropped, a last answer without them gets empty ones
    "{% set ns = namespace(last=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% set said = message.content.split('</think>')[-1] %}"
    "{% if message.role == 'assistant' and loop.index0 > ns.last %}"
    "{% if '</think>' in message.content %}{{ message.content }}{% else %}<think></think>{{ said }}{% endif %}"
    "{% else %}{{ said }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BACKWARDS = "{% for message in messages | reverse %}{{ message.role }}: {{ message.content }};{% endfor %}"
COUNTING = (  # writes the length of the last answer in front
    "{{ messages[-1].content | length }}{% for message in messages %}"
    "{{ message.role }}: {{ message.content }};{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who are you"},
    {"role": "assistant", "content": "I am a bot"},
    {"role": "user", "content": "And now"},
    {"role": "assistant", "content": "<think>hm</think>Still one"},
]


def chat_tokenizer(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"]}
    )
    tokenizer.add_tokens(list("|<>/[]:;\n!-"))
    tokenizer.chat_template = template
    return tokenizer


def text_model(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)


def answers(template: str, chat) -> list[str]:
    """What counts of a chat, run by run."""
    tokenizer = chat_tokenizer(template)
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    text = pack_to_train(text_model(tokenizer), tokenizer, [{"messages": chat}], seq_len=len(whole))
    assert text.input_ids[0].tolist() == whole
    runs, inside = [], False
    for token, label in zip(text.input_ids[0].tolist(), text.labels[0].tolist(), strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            if not inside:
                runs.append([])
            runs[-1].append(token)
        inside = label != IGNORED
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, ["I am a bot<|im_end|>", "<think>hm</think>Still one<|im_end|>"]),
        (HEADERS, ["I am a bot<|eot|>", "<think>hm</think>Still one<|eot|>"]),
        (MERGED, [" I am a bot</s>", " <think>hm</think>Still one</s>"]),
        (FORGETFUL, ["I am a bot<|im_end|>", "<think>hm</think>Still one<|im_end|>"]),
    ],
    ids=["chatml", "headers", "merged", "forgetful"],
)
def test_only_answers_count(template, expected):
    assert answers(template, CHAT) == expected


def test_thoughts_that_the_template_drops_do_not_count():
    chat = [*CHAT, {"role": "user", "content": "Why"}, {"role": "assistant", "content": "Because"}]
    expected = ["I am a bot<|im_end|>", "Still one<|im_end|>", "<think></think>Because<|im_end|>"]
    assert answers(FORGETFUL, chat) == expected


def test_a_chat_that_starts_with_an_answer_and_one_whose_content_is_trimmed():
    chat = [{"role": "assistant", "content": "  Hello \n"}, {"role": "user", "content": " Hi "}]
    assert answers(HEADERS, chat) == ["Hello<|eot|>"]
    assert answers(CHATML, chat) == ["  Hello \n<|im_end|>"]


@pytest.mark.parametrize("template", [BACKWARDS, COUNTING], ids=["backwards", "counting"])
def test_templates_that_do_not_show_where_an_answer_is_are_refused(template):
    with pytest.raises(ValueError, match="chat 0: expected a chat template that shows where the answer in message 2"):
        answers(template, CHAT)


def test_chats_that_the_template_or_we_refuse():
    tokenizer = chat_tokenizer(MERGED)
    with pytest.raises(ValueError, match="chat 0: the chat template refuses it: roles are system"):
        pack_to_train(text_model(tokenizer), tokenizer, [{"messages": [{"role": "robot", "content": "x"}]}], seq_len=4)
    tokenizer.chat_template = CHATML
    model = text_model(tokenizer)
    with pytest.raises(ValueError, match="chat 0: expected message 1 as a dict with a role"):
        pack_to_train(model, tokenizer, [{"messages": [CHAT[0], "hello"]}], seq_len=4)
    with pytest.raises(ValueError, match="without an answer of the assistant"):
        pack_to_train(model, tokenizer, [{"messages": CHAT[:2]}], seq_len=4)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        pack_to_train(model, tokenizer, [{"messages": CHAT}], seq_len=4)


def test_plain_text_counts_whole_and_the_order_comes_from_the_seed():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    documents = [f"{letter} " * 9 for letter in "abcdefgh"]
    one, again, other = (pack_to_train(model, tokenizer, documents, seq_len=7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.input_ids, again.input_ids) and one.fingerprint == again.fingerprint
    assert not torch.equal(one.input_ids, other.input_ids) and one.fingerprint != other.fingerprint
    assert torch.equal(one.labels[:, 1:], one.input_ids[:, 1:]) and (one.labels[:, 0] == IGNORED).all()
    tokens = sum(len(tokenizer(each).input_ids) for each in documents)
    assert one.input_ids.shape == (tokens // 7, 7)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    joined = [token for index in shuffled for token in tokenizer(documents[index]).input_ids]
    assert one.input_ids.flatten().tolist() == joined[: len(joined) // 7 * 7]


def test_text_behind_the_budget_is_left_out():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    documents = ["abc " * 20] * 50
    assert pack_to_train(model, tokenizer, documents, seq_len=8, most_tokens=100).input_ids.shape == (12, 8)
    assert pack_to_train(model, tokenizer, documents, seq_len=8, most_tokens=3).input_ids.shape == (1, 8)


def test_ids_keep_their_order_and_their_labels_are_their_own():
    ids = torch.arange(40).view(4, 10)
    text = pack_to_train(tiny_model("llama"), None, ids, seq_len=10)
    assert torch.equal(text.input_ids, ids) and ids[0, 0] == 0
    assert text[2]["input_ids"].tolist() == list(range(20, 30)) and isinstance(text, TrainingText)


def test_too_little_text_and_ids_that_do_not_fit():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(ValueError, match="at least one sequence of 100 tokens, found 4 tokens in all"):
        pack_to_train(model, tokenizer, ["abc"], seq_len=100)
    with pytest.raises(ValueError, match="below the vocabulary size 64, got 64"):
        pack_to_train(model, None, torch.tensor([[1, 64]]), seq_len=2)
    for wrong in (-1, IGNORED):  # which a GPU's lookup of embeddings would end the process for
        with pytest.raises(ValueError, match=f"expected token ids from 0 on, got {wrong}"):
            pack_to_train(model, None, torch.tensor([[1, wrong, 2]]), seq_len=3)
