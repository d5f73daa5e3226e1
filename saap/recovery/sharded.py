"""What learns in a model that FSDP, its second version, has spread over processes: put together and taken apart."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from saap.recovery.training_folder import LEARNED

OPTIMIZER = "optimizer.pt"
INSIDE = "model."  # of an Objective
WRAPPED = "_checkpoint_wrapped_module."  # where FSDP checkpoints activations


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that learn and are NaN or infinite in this process's part of them."""
    learning = ((name, each.detach()) for name, each in model.named_parameters() if each.requires_grad)
    return [name for name, each in learning if not bool(_local(each).isfinite().all())]


def gather_learned(model: nn.Module) -> dict[str, Tensor]:
    """All of what learns, on the CPU of the first process, by the names that it has unsharded; empty on others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    learning = {name.replace(WRAPPED, "") for name, each in model.named_parameters() if each.requires_grad}
    return {name.removeprefix(INSIDE): as_tensor(each) for name, each in state.items() if name in learning}


def spread_learned(model: nn.Module, checkpoint: Path) -> None:
    """A checkpoint's parameters into a sharded model."""
    state = {INSIDE + name: tensor for name, tensor in load_file(checkpoint / LEARNED).items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path, first: bool, started: bool) -> None:
    """The whole state of a sharded optimizer into one file, unless it has not ``started``: torch would make a step."""
    if started:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(model, _inner(optimizer), options=options)
        if first:
            torch.save(state, folder / OPTIMIZER)


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """What ``save_optimizer`` wrote, each process its part."""
    if (folder / OPTIMIZER).is_file():
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, _inner(optimizer), state, options=options)


def as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)  # as full_state_dict leaves them
    return value


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]  # out of accelerate's wrapper


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
