"""Next-token loss of a batch, backpropagated in chunks so that full logits never exist."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

LOGIT_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of fp32 logits, a few times that with their gradient


def sequence_spans(attention_mask: Tensor) -> Tensor:
    """Row ranges of the real tokens of each sequence in the flattened batch; mask (B, T) -> (B, 2) int32 on the CPU.

    Raises ValueError unless each row's real tokens are consecutive (left or right padding).
    """
    mask = attention_mask.cpu().bool()
    length = mask.sum(1)
    first = mask.int().argmax(1)
    inside = (torch.arange(mask.shape[1]) >= first[:, None]) & (torch.arange(mask.shape[1]) < (first + length)[:, None])
    if not torch.equal(inside, mask) or bool((length < 2).any()):
        raise ValueError("expected attention_mask rows with one run of at least 2 ones each")
    start = torch.arange(len(mask)) * mask.shape[1] + first
    return torch.stack([start, start + length], 1).int()


def backward_sequence_losses(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, loss_scale: float = 1.0
) -> Tensor:
    """Backpropagate the sum over sequences of each sequence's mean next-token loss (method, Notation).

    input_ids (B, T); attention_mask (B, T) or None for no padding. Returns the (B,) losses, fp32,
    unscaled. The gradient of the hidden states is formed chunk by chunk through the output head,
    then the blocks run backward once.
    """
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    targets = _next_tokens(input_ids, attention_mask)  # [B, T], -100 where nothing is predicted
    predicted = (targets != -100).sum(1)  # [B]
    weight = predicted.double().reciprocal().repeat_interleave(targets.shape[1])  # [B * T]
    rows = hidden.detach().flatten(0, 1)  # [B * T, D]
    gradient = torch.empty_like(rows)
    losses = torch.empty(len(rows), dtype=torch.float64, device=hidden.device)
    head = model.get_output_embeddings()
    step = max(1, LOGIT_CHUNK_ELEMENTS // head.weight.shape[0])
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        with torch.no_grad():
            logits = head(rows[chunk]).requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(
                final_logits(model, logits), targets.flatten()[chunk], reduction="none", ignore_index=-100
            )
            loss = loss * weight[chunk].to(loss.dtype)
            (d_logits,) = torch.autograd.grad(loss.sum() * loss_scale, logits)
        # by hand, so that autograd does not save the head's weight
        gradient[chunk] = d_logits @ head.weight
        losses[chunk] = loss.detach().double()
    hidden.backward(gradient.view_as(hidden))
    return losses.view_as(targets).sum(1).float()


def final_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Logits in fp32 (float64 stays) with the family's scaling; inputs (rows, vocabulary)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _next_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    targets = torch.full_like(input_ids, -100)
    targets[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        targets[:, :-1].masked_fill_(attention_mask[:, 1:] == 0, -100)
        targets.masked_fill_(attention_mask == 0, -100)
    return targets
