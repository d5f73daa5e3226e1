"""What a model directory holds, read from its configuration and file headers: no weight is loaded."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from saap.checkpoint import PLAN_FILE
from saap.cost import cost_of
from saap.layout import is_template
from saap.opening import has_tokenizer
from saap.plan import Plan
from saap.quantised_config import COMPRESSED, described_in, in_words
from saap.quantiser import SaapConfig, make_blank
from saap.report import REPORT_FILE
from saap.stored_weight import METHOD
from saap.tensor_parallel import device_counts
from saap.units import LayerUnits, discover

WEIGHT_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelInfo:
    """One model directory.

    ``layout`` is "stock" (loads with transformers alone) or "template" (sizes by layer: needs ``import saap``
    or ``trust_remote_code=True``). ``stored`` counts elements by safetensors dtype. ``parameters`` counts tied
    tensors once. ``weight_bytes`` is what the weight files take, ``disk_bytes`` the whole directory.
    ``quantised``: "int4 in groups of 32", say, or None.
    """

    path: str
    family: str
    model_class: str
    layout: str
    layers: tuple[LayerUnits, ...]
    parameters: int
    block_parameters: int
    vocab_size: int
    positions: int | None
    stored: dict[str, int]
    weight_files: int
    weight_bytes: int
    disk_bytes: int
    kv_cache_bytes_per_token: int
    tokenizer: bool
    report: bool
    written_by: str
    plan: Plan | None
    quantised: str | None = None

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        return len(set(self.layers)) == 1

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        """Numbers of devices that can share every layer."""
        return device_counts(self.layers)

    @property
    def dtypes(self) -> str:
        """Stored dtypes, the most frequent first."""
        return ", ".join(sorted(self.stored, key=lambda dtype: -self.stored[dtype]))

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("layers", "plan")}
        layers = [asdict(layer) for layer in self.layers]
        plan = self.plan
        made = None if plan is None else {
            "removed_share": plan.ratio, "removed_share_of_blocks": plan.block_ratio, "settings": plan.settings,
        }  # fmt: skip
        own = {"uniform": self.uniform, "tensor_parallel": list(self.tensor_parallel)}
        return values | own | {"layers": layers, "plan": made}


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a directory without weights, all on the meta device; errors as ``model_info``."""
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a local model directory, found none at {folder}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"expected a model directory with config.json, found none in {folder}")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    described = getattr(config, "quantization_config", None) or {}
    if described.get("quant_method") == METHOD:
        make_blank(model, SaapConfig(**described))
    elif described.get("quant_method") == COMPRESSED:  # as it is loaded
        del config.quantization_config
    return model


def model_info(path: str | os.PathLike[str]) -> ModelInfo:
    """Describe the model directory at ``path``, dense or pruned.

    Raises FileNotFoundError for what is no model directory, ValueError for families that ``discover`` does not
    know, and, naming the file or tensor, for weights that are missing, damaged or of other sizes than the
    configuration says.
    """
    folder = Path(path)
    model = skeleton(folder)
    config, units = model.config, discover(model, accelerated=True)
    files = _weight_files(folder)
    stored = _check_weights(files, model)
    plan_file = folder / PLAN_FILE
    cost = cost_of(model, context=0)
    return ModelInfo(
        path=str(folder),
        family=units.family,
        model_class=type(model).__name__,
        layout="template" if is_template(model) else "stock",
        layers=units.layers,
        parameters=units.total_parameters,
        block_parameters=units.block_parameters,
        vocab_size=config.vocab_size,
        positions=getattr(config, "max_position_embeddings", None),
        stored=stored,
        weight_files=len(files),
        weight_bytes=sum(file.stat().st_size for file in files),
        disk_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        kv_cache_bytes_per_token=cost.kv_cache_bytes_per_token,
        tokenizer=has_tokenizer(folder),
        report=(folder / REPORT_FILE).is_file(),
        written_by=_written_by(folder),
        plan=Plan.load(plan_file) if plan_file.is_file() else None,
        quantised=_quantised(folder),
    )


EXPERTS = ".experts."  # in the names of their tensors, in files and in models


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint: those that its index names, or all there are."""
    index = folder / WEIGHT_INDEX
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error}") from error
        for name in named:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{index} names {name}, which is not in {folder}")
        return [folder / name for name in named]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"expected .safetensors weights in {folder}, found none")
    return files


def _check_weights(files: list[Path], model: PreTrainedModel) -> dict[str, int]:
    """Elements by dtype from the files' headers; refuses sizes that are not the configuration's."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, int] = {}
    in_experts = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  # not a mapping
                    piece = handle.get_slice(name)
                    shape, dtype = piece.get_shape(), piece.get_dtype()
                    if name in wanted and shape != wanted[name]:
                        raise ValueError(f"{file}: expected {name} of shape {wanted[name]}, got {shape}")
                    stored[dtype] = stored.get(dtype, 0) + torch.Size(shape).numel()
                    in_experts += torch.Size(shape).numel() if EXPERTS in name else 0
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
    configured = sum(torch.Size(shape).numel() for name, shape in wanted.items() if EXPERTS in name)
    if in_experts != configured:  # stock files name experts one by one, the model has them in one tensor
        raise ValueError(f"{files[0].parent}: expected {configured:,} weights of experts, got {in_experts:,}")
    return stored


def _quantised(folder: Path) -> str | None:
    described = described_in(folder)
    return None if described is None else in_words(described)


def _written_by(folder: Path) -> str:
    """The program that wrote the directory, as far as its files say."""
    plan = folder / PLAN_FILE
    if plan.is_file():
        written = json.loads(plan.read_text(encoding="utf-8")).get("written_by")
        if written:
            return str(written)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    version = config.get("transformers_version")
    return f"transformers {version}" if version else "unknown"
