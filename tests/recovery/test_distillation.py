"""Losses of recovery against plain float64 formulas over whole logits."""

import pytest
import torch
from torch import nn

from saap.recovery import distillation
from saap.recovery.distillation import Distillation, Objective, check_teacher, check_tokenizers, divergence, summed_loss
from saap.recovery.training_text import IGNORED
from tests.saap.tiny import DENSE, FAMILIES, tiny_model, tiny_tokenizer

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: sums of some hundred terms, in another order


def batch(vocabulary: int = 64, ignored: bool = True):
    ids = torch.randint(0, vocabulary, (3, 11), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    if ignored:
        labels[0, 2:6] = IGNORED
        labels[2, :] = IGNORED
        labels[2, 4] = ids[2, 4]
    return ids, labels


def positions(labels):
    return [(b, t) for b in range(labels.shape[0]) for t in range(labels.shape[1] - 1) if labels[b, t + 1] != IGNORED]


def next_token_oracle(logits, labels):
    return sum(-(logits[b, t] - logits[b, t].logsumexp(0))[labels[b, t + 1]] for b, t in positions(labels))


def divergence_oracle(logits, teacher, labels, top_k):
    """By probabilities, token by token: sum of p (log p - log q), with a bucket of the tokens that are left."""
    total = torch.zeros((), dtype=torch.float64)
    for b, t in positions(labels):
        p, q = teacher[b, t].softmax(0), logits[b, t].softmax(0)
        if top_k is not None and top_k < len(p):
            first = sorted(range(len(p)), key=lambda token: -float(p.detach()[token]))
            likely, rest = first[:top_k], first[top_k:]
            p, q = (torch.cat([each[likely], each[rest].sum()[None]]) for each in (p, q))
        total = total + (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize("chunk", [1 << 25, 64 * 5], ids=["whole", "chunks"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_next_token_loss_of_every_family(family, chunk, monkeypatch):
    monkeypatch.setattr(distillation, "LOGIT_CHUNK_ELEMENTS", chunk)
    model = tiny_model(family)
    ids, labels = batch()
    wanted = next_token_oracle(model(ids).logits, labels)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(wanted, [model.get_parameter(name) for name in names], allow_unused=True)
    found = summed_loss(model, ids, labels)
    torch.testing.assert_close(found, wanted, **EXACT)
    gradients = torch.autograd.grad(found, [model.get_parameter(name) for name in names], allow_unused=True)
    for name, mine, theirs in zip(names, gradients, expected, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=name)  # through three layers


@pytest.mark.parametrize("chunk", [1 << 25, 64 * 5], ids=["whole", "chunks"])
@pytest.mark.parametrize("top_k", [1, 4, 63, 64, 1000, None])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_from_a_teacher(family, top_k, chunk, monkeypatch):
    monkeypatch.setattr(distillation, "LOGIT_CHUNK_ELEMENTS", chunk)
    model, teacher = tiny_model(family), tiny_model(family, seed=1)
    ids, labels = batch()
    wanted = divergence_oracle(model(ids).logits, teacher(ids).logits.detach(), labels, top_k)
    found = Objective(model, Distillation(teacher, top_k))(ids, labels)
    torch.testing.assert_close(found, wanted, **EXACT)
    parameter = model.model.norm.weight
    torch.testing.assert_close(
        *(torch.autograd.grad(each, parameter)[0] for each in (found, wanted)), rtol=1e-8, atol=1e-10
    )


def test_all_parts_together_and_only_counted_positions():
    model, teacher = tiny_model("qwen2"), tiny_model("qwen2", seed=1)
    ids, labels = batch()
    mine, theirs = (each(ids, output_hidden_states=True) for each in (model, teacher))
    wanted = divergence_oracle(mine.logits, theirs.logits, labels, 5) + 0.3 * next_token_oracle(mine.logits, labels)
    for b, t in positions(labels):
        ratios = [
            (own[b, t] - other[b, t]).square().sum() / other[b, t].square().sum()
            for own, other in zip(mine.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        ]
        wanted = wanted + 0.2 * sum(ratios) / len(ratios)
    objective = Objective(model, Distillation(teacher, 5, next_token=0.3, hidden=0.2))
    torch.testing.assert_close(objective(ids, labels), wanted, **EXACT)
    torch.testing.assert_close(objective(ids, labels, plain=True), next_token_oracle(mine.logits, labels), **EXACT)
    assert not any(each is parameter for each in objective.parameters() for parameter in teacher.parameters())


def test_a_model_that_equals_its_teacher_has_no_loss_and_one_without_positions_neither():
    model = tiny_model("llama")
    ids, labels = batch()
    # the bucket's and the tokens' logarithms are taken in other orders: some units in the last place of float64
    assert abs(float(Objective(model, Distillation(model, 3, hidden=1.0))(ids, labels))) < 1e-12
    loss = Objective(model, Distillation(tiny_model("llama", seed=1), 3, hidden=1.0))(
        ids, torch.full_like(ids, IGNORED)
    )
    assert float(loss) == 0.0
    loss.backward()
    assert float(model.model.norm.weight.grad.abs().max()) == 0.0


def test_a_certain_teacher_leaves_finite_losses_and_gradients_in_fp32():
    teacher = torch.full((2, 50), -30.0)
    teacher[:, 7] = 60.0
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = divergence(logits, teacher, 4)
    loss.backward()
    wanted = -logits.detach().log_softmax(-1)[:, 7].sum()  # all of the teacher's mass is on token 7
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=1e-5)  # fp32
    assert bool(logits.grad.isfinite().all())


def test_the_rest_is_summed_where_the_chosen_have_nearly_all():
    logits = torch.zeros(1, 40, dtype=torch.float32)
    logits[0, :2] = 18.0  # the rest has 38 exp(-18) / 2 of the mass: 3e-7, of which 1 - p in fp32 keeps two bits
    teacher = logits.clone()
    teacher[0, 2:] += torch.linspace(1, 3, 38)
    found = divergence(logits, teacher, 2)
    p, q = teacher.double().softmax(-1)[0], logits.double().softmax(-1)[0]
    buckets = [torch.cat([each[:2], each[2:].sum()[None]]) for each in (p, q)]
    wanted = (buckets[0] * (buckets[0] / buckets[1]).log()).sum()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-7)  # three logarithms of fp32, 2^-23 each


@pytest.mark.parametrize("family", DENSE)
def test_logits_exist_a_chunk_at_a_time(family, monkeypatch):
    monkeypatch.setattr(distillation, "LOGIT_CHUNK_ELEMENTS", 64 * 4)
    model = tiny_model(family, dtype=torch.float32)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, given, out: rows.append(out.numel() // 64))
    ids, labels = batch(ignored=False)
    summed_loss(model, ids, labels).backward()
    assert max(rows) <= 4 and sum(rows) == 2 * 3 * 10  # forward, and again in the backward pass


def test_peft_models_are_run_with_their_adapters():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", dtype=torch.float32)
    ids, labels = batch()
    before = float(summed_loss(model, ids, labels).detach())
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    found, wanted = summed_loss(wrapped, ids, labels), next_token_oracle(wrapped(ids).logits, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)  # fp32 sums of 14 terms near 5
    assert abs(float(found.detach()) - before) > 1e-3


def test_teachers_that_do_not_fit():
    model = tiny_model("llama")
    check_teacher(model, tiny_model("llama", seed=1), hidden=1.0)
    with pytest.raises(ValueError, match="vocabulary of 64 tokens, got one of 65"):
        check_teacher(model, tiny_model("llama", vocab_size=65))
    wider = tiny_model("llama", hidden_size=96)
    check_teacher(model, wider)
    with pytest.raises(ValueError, match="a teacher with hidden_size 64, got 96; use hidden=0"):
        check_teacher(model, wider, hidden=0.1)
    with pytest.raises(ValueError, match="num_hidden_layers 3, got 2"):
        check_teacher(model, tiny_model("llama", num_hidden_layers=2), hidden=0.1)
    own, other = tiny_tokenizer(), tiny_tokenizer()
    check_tokenizers(own, other)
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match="1 tokens differ, 'new' is None here and 64 there"):
        check_tokenizers(own, other)


def test_an_objective_is_a_module_of_the_learner_alone():
    objective = Objective(tiny_model("llama"), Distillation(tiny_model("llama", seed=1)))
    assert isinstance(objective, nn.Module) and [name for name, _ in objective.named_children()] == ["model"]
