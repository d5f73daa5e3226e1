"""SAAP: make a language model structurally smaller in one fast pass, and serve it anywhere.

Importing this package lets transformers' Auto classes load pruned and quantised checkpoints.
"""

from saap.accelerate import Accelerated, accelerate
from saap.calibrate import calibrate
from saap.checkpoint import load, save
from saap.collect import collect
from saap.compact import compact
from saap.compensate import Compensation, compensation
from saap.compensated_scores import compensated_scores
from saap.criteria import CRITERIA, score
from saap.evaluate import Evaluation, evaluate
from saap.families import Family, known_families, register_family
from saap.latency import LatencyTable
from saap.layout import register_template_classes
from saap.peft_targets import lora_targets
from saap.plan import LayerPlan, Plan
from saap.prune import PruneResult, prune
from saap.quantise import export_quantised, quantise
from saap.quantiser import SaapConfig
from saap.recovery.recover import Recovered, recover
from saap.report import report
from saap.scores import Scores
from saap.search import search
from saap.serving.check import Check, check
from saap.statistics import Statistics
from saap.stream import Streaming
from saap.units import Units, discover, unit_masks
from saap.version import __version__

register_template_classes()

__all__ = [
    "CRITERIA",
    "Accelerated",
    "Check",
    "Compensation",
    "Evaluation",
    "Family",
    "LatencyTable",
    "LayerPlan",
    "Plan",
    "PruneResult",
    "Recovered",
    "SaapConfig",
    "Scores",
    "Statistics",
    "Streaming",
    "Units",
    "__version__",
    "accelerate",
    "calibrate",
    "check",
    "collect",
    "compact",
    "compensated_scores",
    "compensation",
    "discover",
    "evaluate",
    "export_quantised",
    "known_families",
    "load",
    "lora_targets",
    "prune",
    "quantise",
    "recover",
    "register_family",
    "report",
    "save",
    "score",
    "search",
    "unit_masks",
]
