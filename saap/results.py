"""What ``saap prune`` made, and how it is printed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saap import console
from saap.compensated_scores import ENOUGH
from saap.evaluate import Evaluation
from saap.plan import Plan


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan's sizes as plain values."""
    return {
        "removed_share": plan.ratio,
        "removed_share_of_blocks": plan.block_ratio,
        "parameters": plan.units.total_parameters - plan.removed_parameters,
        "kv_heads": [len(layer.kv_heads) for layer in plan.layers],
        "channels": [layer.width for layer in plan.layers],  # of each expert in a mixture
        **({"experts": [len(layer.experts) for layer in plan.layers]} if any(x.experts for x in plan.layers) else {}),
    }


@dataclass(frozen=True)
class Result:
    """One pruned model on disk.

    ``parameters`` counts biases that compensation added too; ``baselines`` are what other criteria would have made.
    """

    out: Path
    plan: Plan
    parameters: int
    evaluation: Evaluation | None
    baselines: list[tuple[str, Evaluation]] = field(default_factory=list)
    report: Path | None = None


def describe_scores(plan: Plan) -> str | None:
    """Whether a plan was made by compensated scores, and of how much text; None where nothing says so."""
    compensated, text = (plan.settings.get(name) for name in ("compensated_scores", "tokens_per_input"))
    if compensated is None or text is None:
        return None
    if compensated:
        return f"searched by compensated scores of {text:g} tokens for every input"
    return (
        f"searched by plain scores: {text:g} tokens for every input, compensated ones take {ENOUGH:g} "
        "(more --samples, or --compensated-scores on)"
    )


def report(results: list[Result], as_json: bool) -> None:
    """Print what was made, as a table or as JSON."""
    if as_json:
        outputs = [
            {
                "out": str(r.out),
                **describe_plan(r.plan),
                "scores": describe_scores(r.plan),
                "parameters": r.parameters,
                "evaluation": r.evaluation and r.evaluation.to_dict(),
                "baselines": {name: found.to_dict() for name, found in r.baselines},
                "report": r.report and str(r.report),
            }
            for r in results
        ]
        console.print_json({"outputs": outputs})
        return
    evaluated = [r for r in results if r.evaluation is not None]
    if evaluated:
        first = next(r.evaluation for r in evaluated if r.evaluation is not None)
        rows = [] if first.against is None else [console.evaluation_row("dense", first.against)]
        for r in evaluated:
            share = f" {r.plan.ratio:.0%}" if len(results) > 1 else ""
            shown = [(r.out.name, r.evaluation), *((f"{name}{share}", e) for name, e in r.baselines)]
            rows += [console.evaluation_row(name, e) for name, e in shown if e is not None]
        console.print_table(f"windows of {first.seq_len} tokens", console.EVALUATION_HEADER, rows)
    for r in results:
        print(
            f"{r.out}: {r.parameters:,} parameters, {r.plan.ratio:.2%} removed ({r.plan.block_ratio:.2%} of the blocks)"
        )
        if (scores := describe_scores(r.plan)) is not None:
            print(f"  {scores}")
        if r.report is not None:
            print(f"  what happened to it: {r.report}")
