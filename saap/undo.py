"""Temporary changes to a model that are taken back in reverse order, whatever happened in between."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn


class Undo:
    """What brings a model back to how it was found; ``restore`` may be called twice."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        self._steps.append(step)

    def patch_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give ``module`` another forward; an earlier patch of somebody else's comes back afterwards."""
        previous = module.__dict__.get("forward")
        if previous is None:
            self.add(partial(module.__dict__.pop, "forward"))
        else:
            self.add(partial(setattr, module, "forward", previous))
        module.forward = forward  # type: ignore[method-assign]  # a patch is one

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """No gradients for ``parameters`` until ``restore``."""
        for parameter in parameters:
            if parameter.requires_grad:
                self.add(partial(parameter.requires_grad_, True))
                parameter.requires_grad_(False)

    def eval_mode(self, model: nn.Module) -> None:
        """Eval mode for ``model`` until ``restore``, which knows which modules were training."""
        for module in model.modules():
            if module.training:
                self.add(partial(setattr, module, "training", True))
        model.eval()

    def restore(self) -> None:
        while self._steps:
            self._steps.pop()()
