"""Weights of norms that learn: in fp32, whatever the model's dtype."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LearnedNorms:
    """Lets the weights of all modules whose class is called a Norm learn until ``finish``.

    Those of a 16-bit model learn in fp32, for steps far below their last bit, and are rounded each time that they are
    used: the module's ``weight`` is that of ``finish`` at any time. Their biases, which few families have, are left.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms: list[tuple[nn.Module, nn.Parameter]] = []
        for _, module in norms(model):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            self._norms.append((module, weight))
            if weight.dtype not in (torch.float32, torch.float64):
                module.weight = nn.Parameter(weight.detach().float())
                parametrize.register_parametrization(module, "weight", _Rounded(weight.dtype), unsafe=True)
        for _, parameter in learned_weights(model):
            parameter.requires_grad_(True)

    @torch.no_grad()
    def finish(self) -> None:
        """Plain weights in the model's dtype again: the parameters that were there, with what they have learned."""
        for module, weight in self._norms:
            if parametrize.is_parametrized(module, "weight"):
                learned = getattr(module, "weight").detach()  # noqa: B009  # computed, whatever it is typed as
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                module.weight = weight
                weight.data = learned.to(weight.dtype)  # on another device, if the model has moved


def norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the modules whose class is called a Norm and that have a weight."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor)
    ]


def learned_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name of the norm, the fp32 or fp64 parameter behind its weight)."""
    found = []
    for name, module in norms(model):
        held = module.parametrizations["weight"].original if parametrize.is_parametrized(module, "weight") else None  # type: ignore[union-attr,index]  # torch types neither
        parameter = module.weight if held is None else held
        assert isinstance(parameter, nn.Parameter)
        found.append((name, parameter))
    return found


class _Rounded(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rounded_to = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.rounded_to)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight
