"""What learns in a model, by method: attached to train, and finished into a model that holds nothing else."""

from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from saap.recovery.settings import Settings


class Attached(Protocol):
    """A model with what learns attached: its parameters that require grad learn, all others are frozen."""

    model: nn.Module  # what the trainer runs; called with input_ids, use_cache, output_hidden_states

    def finish(self) -> PreTrainedModel:
        """The model with all that was learned merged into its weights, saved like any other."""
        ...


def attach(model: PreTrainedModel, settings: Settings) -> Attached:
    """Make ``model`` one that learns by ``settings.method``, in place; quantised before, where the settings say bits.

    Raises ValueError before the model is changed.
    """
    raise NotImplementedError
