"""Models with group-wise adapters that have learned something, for the tests."""

import torch

import saap
from saap.recovery.adapted_linear import adapted_linears
from saap.recovery.attach import attach
from saap.recovery.settings import Settings
from tests.saap.tiny import tiny_model

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def quantised(family: str = "llama", bits: int = 4, group_size: int = 32, dtype=torch.float32, **sizes):
    return saap.quantise(tiny_model(family, dtype, **sizes), bits=bits, group_size=group_size)


def settings(bits: int | None = 4, group_size: int = 32, **others) -> Settings:
    return Settings(**{"bits": bits, "group_size": group_size, "rank": 2, **others})


@torch.no_grad()
def stir(model, seed: int = 1) -> None:
    """As if all adapters and norms had learned much: factors that began at zero, and norms, are drawn."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn if "lora_" in name else parameter + drawn)


def adapted(family: str = "llama", bits: int = 4, group_size: int = 32, dtype=torch.float32, norms=True, **others):
    """(attached, its model) stirred, in eval mode."""
    model = quantised(family, bits, group_size, dtype)
    attached = attach(model, settings(bits, group_size, norms=norms, **others))
    assert list(adapted_linears(model))
    stir(model)
    return attached, model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def trained(model, steps: int = 4, learning_rate: float = 1e-2) -> list[float]:
    """The losses of some steps on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses
