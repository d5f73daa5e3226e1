"""What a model directory holds, read from its configuration and file headers: no weight is loaded."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from saap.checkpoint_files import PLAN_FILE, check_directory, weight_files
from saap.cost import cost_of
from saap.layout import is_template
from saap.opening import has_tokenizer
from saap.plan import Plan
from saap.report import REPORT_FILE
from saap.tensor_parallel import device_counts
from saap.units import LayerUnits, Units, discover
from saap.weight_headers import Quantisation, check_weights


@dataclass(frozen=True)
class ModelInfo:
    """One model directory.

    ``layout`` is "stock" (loads with transformers alone) or "template" (sizes by layer: needs ``import saap``
    or ``trust_remote_code=True``). ``stored`` counts elements by safetensors dtype. ``parameters`` counts tied
    tensors once, quantised ones by the weights they stand for. ``weight_bytes`` is what the weight files take,
    ``disk_bytes`` the whole directory. ``units`` and ``config`` are those of the model without quantisation.
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
    units: Units
    config: PreTrainedConfig
    quantisation: Quantisation | None = None

    @property
    def quantised(self) -> str | None:
        """How the layers' Linears are stored, "int4 in groups of 32", say; None for plain weights."""
        return None if self.quantisation is None else str(self.quantisation)

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
        apart = ("layers", "plan", "units", "config", "quantisation")
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in apart}
        layers = [asdict(layer) for layer in self.layers]
        plan = self.plan
        made = None if plan is None else {
            "removed_share": plan.ratio, "removed_share_of_blocks": plan.block_ratio, "settings": plan.settings,
        }  # fmt: skip
        own: dict[str, Any] = {"uniform": self.uniform, "tensor_parallel": list(self.tensor_parallel)}
        own |= {"quantised": self.quantised}
        return values | own | {"layers": layers, "plan": made}


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a directory without weights, on the meta device, quantised or not; errors as ``check_directory``."""
    config = check_directory(folder)
    vars(config).pop("quantization_config", None)  # the plain model has the sizes
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)


def model_info(path: str | os.PathLike[str]) -> ModelInfo:
    """Describe the model directory at ``path``, dense or pruned.

    Raises FileNotFoundError for what is no model directory, ValueError for families that ``discover`` does not
    know, for a quantisation that is not known, and, naming the file or tensor, for weights that are missing, damaged
    or of other sizes than the configuration says.
    """
    folder = Path(path)
    model, quantisation = skeleton(folder), _quantisation(folder / "config.json")
    config, units = model.config, discover(model)
    files = weight_files(folder)
    stored = check_weights(files, model, quantisation)
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
        units=units,
        config=config,
        quantisation=quantisation,
    )


def _quantisation(config: Path) -> Quantisation | None:
    found = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    return None if found is None else Quantisation.of(found, config)


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
