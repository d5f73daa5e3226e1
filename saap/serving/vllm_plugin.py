"""The entry point of vLLM's general plugins: pruned models and quantised checkpoints without flags."""


def register() -> None:
    """Make vLLM know the classes of pruned checkpoints and quant_method "saap"; may be called again."""
    raise NotImplementedError
