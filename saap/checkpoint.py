"""Save and load pruned checkpoints: Hugging Face directories, written whole or not at all."""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from saap.card import CARD_FILE, Made, model_card
from saap.checkpoint_files import PLAN_FILE, check_directory
from saap.compact import PLAN_ATTRIBUTE
from saap.families import Family, family_of, is_mixture
from saap.layout import LAYOUTS, adopt, describe_as_mistral, describe_as_stock, describe_as_template, is_template
from saap.peft_targets import register_peft_targets
from saap.plan import Plan
from saap.quantised_config import loading_options, make_plain
from saap.refuse import refuse_unsupported
from saap.units import Units, discover
from saap.version import __version__

OF_A_LAYER = re.compile(r"\.layers\.\d+\..*weight$")


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layout: str = "auto",
    force: bool = False,
    plan: Plan | None = None,
    also: Callable[[Path], None] | None = None,
    made: Made | None = None,
) -> None:
    """Write ``model`` as a Hugging Face directory with safetensors, plan and model card.

    ``layout`` "stock" writes a model of its own family that loads anywhere (all layers of one size);
    "template" writes per-layer sizes and the two template files, for ``import saap`` or
    ``trust_remote_code=True``; "auto" prefers stock. The plan is the one ``compact`` applied, unless given.
    The directory appears at once, complete; ``force`` replaces an existing one only then. ``also`` is called
    with it before that, to write more files into it. ``made`` is what the card tells beside the plan.

    Raises FileExistsError before any work, and ValueError when a stock layout cannot express the sizes.
    """
    target = Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    refuse_existing(target, force)
    refuse_unsupported(model, accelerated=True)
    units = discover(model, accelerated=True)
    plan = plan or getattr(model, PLAN_ATTRIBUTE, None)
    with written_whole(target) as folder, _in_layout(model, units, layout) as described:
        described.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if plan is not None:
            plan.save(folder / PLAN_FILE)
        card = model_card(described, units, plan, __version__, made or Made(base=model.name_or_path))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        if also is not None:
            also(folder)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise FileExistsError unless ``path`` is free, an empty directory, or may be replaced, and can be made.

    PermissionError where the directory that it would be in cannot be written to.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file; expected a directory to write")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise FileExistsError(f"{path} exists already; use force (--force) to replace it")
    above = next((each for each in path.absolute().parents if each.exists()), path)
    if not above.is_dir():
        raise FileExistsError(f"{above} is a file; expected a directory to write {path} in")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"cannot write in {above}: expected a directory to write {path} in")


def refuse_losing(out: str | os.PathLike[str], inputs: Mapping[str, Any]) -> None:
    """Raise ValueError where writing ``out``, which is replaced whole, would delete one of ``inputs`` {what: path}.

    What is no path, or names nothing on this machine, is passed over. What holds the working directory is refused too.
    """
    target = Path(out).resolve()
    if target in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{out} holds the working directory; expected the name of a directory of its own")
    for what, path in inputs.items():
        if not isinstance(path, str | os.PathLike) or not Path(path).exists():
            continue
        found = Path(path).resolve()
        if found == target:
            raise ValueError(f"{out} is the {what} itself; expected another directory: its files would be lost")
        if target in found.parents:
            raise ValueError(f"{out} holds the {what}, {path}; expected another directory: it would be lost")


def load(path: str | os.PathLike[str], dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """Load a dense, pruned or quantised causal language model, in the dtype its configuration states unless given.

    ``path`` is a directory or a hub name. No code of a checkpoint is run and nothing is unpickled: weights are
    safetensors, those in compressed-tensors become plain ones. A model with an attention softcap gets eager attention,
    float64 experts eager products. Raises
    FileNotFoundError for a directory without a configuration, and ValueError naming a damaged or pickled file, a path
    out of the directory, a plan that does not describe the model, or a tensor of another size or missing.
    """
    folder, options = Path(path), dict[str, Any]()
    if folder.exists():
        check_directory(folder)
        options = loading_options(folder)
    elif folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith("."):
        raise FileNotFoundError(f"no such model directory: {path}")
    register_peft_targets()
    model = _checked_model(path, options | ({} if dtype is None else {"dtype": dtype}))
    make_plain(model)
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # sdpa leaves the softcap out; transformers 5.17 takes it all the same
    if is_mixture(model) and model.dtype == torch.float64 and model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation("eager")  # torch's grouped products take no float64
    return model.eval()


def _checked_model(path: str | os.PathLike[str], options: dict[str, Any]) -> PreTrainedModel:
    """The model, all of whose tensors are in its files with the sizes that the configuration states.

    transformers draws missing tensors at random and drops others, with no more than a warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # to unpack what the files describe
        model, found = AutoModelForCausalLM.from_pretrained(
            str(path), use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(f"{path}: the configuration wants {name} of shape {list(wanted)}, the file has {list(stored)}")
    if found["missing_keys"]:
        raise ValueError(f"{path}: the weights lack {min(found['missing_keys'])}, which the configuration wants")
    # stock files may hold what a model has no use for, but not layers beyond those that it has
    homeless = [name for name in found["unexpected_keys"] if is_template(model) or OF_A_LAYER.search(name)]
    if homeless:
        raise ValueError(f"{path}: the configuration has no place for {min(homeless)} of the weights")
    return model


@contextmanager
def _in_layout(model: PreTrainedModel, units: Units, layout: str) -> Iterator[PreTrainedModel]:
    """The model under the configuration to be written; its own is put back afterwards."""
    family = family_of(model)
    if layout == "template":
        config = describe_as_template(model.config, family, units.layers, type(model))
        if is_template(model):
            config = model.config
    else:
        stock = _stock_twin(model, family, units, required=layout == "stock")
        if stock is not None:
            yield stock
            return
        config = model.config
    original, kind = model.config, type(model)
    try:
        adopt(model, family, config)
        yield model
    finally:
        adopt(model, family, original)
        model.__class__ = kind


def _stock_twin(model: PreTrainedModel, family: Family, units: Units, required: bool) -> PreTrainedModel | None:
    """The model as a stock class sharing its weights, or None (ValueError if ``required``) when none fits."""
    if not is_template(model):
        return model
    reasons = []
    if len(set(units.layers)) != 1:
        reasons.append("its layers differ in size")
    else:
        for describe in (describe_as_stock, describe_as_mistral):
            try:
                return _share_weights(model, describe(model.config, family, units.layers[0]))
            except ValueError as error:
                reasons.append(str(error))
    if required:
        raise ValueError(f"this model cannot be saved with layout='stock': {'; '.join(reasons)}; use layout='template'")
    return None


def _share_weights(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A stock model over the same tensors; raises ValueError unless its logits are bitwise equal."""
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    state, known = model.state_dict(), twin.state_dict()
    if state.keys() != known.keys():
        differing = ", ".join(sorted(state.keys() ^ known.keys())[:3])
        raise ValueError(f"{type(twin).__name__} has other tensors ({differing}, ...)")
    twin.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():  # computed at construction, not part of the state
        owner, _, attribute = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    ids = torch.arange(8, device=model.device)[None] % config.vocab_size
    training = model.training
    with torch.no_grad():
        equal = torch.equal(twin.eval()(ids).logits, model.eval()(ids).logits)
    model.train(training)
    if not equal:
        raise ValueError(f"{type(twin).__name__} does not compute the same logits")
    return twin


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A sibling directory that replaces ``target`` when the context ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.incomplete-"
    for stale in target.parent.glob(f"{prefix}*"):  # what a killed process left behind
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            old = folder.with_name(f".{target.name}.replaced-{os.getpid()}")
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
