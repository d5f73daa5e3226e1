"""The demo: prune the shipped model, save it, load it again, and compare it with baselines.

``python -m benchmarks.demo [--ratio 0.2] [--out DIR]``
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import saap
from benchmarks.common import SMALL_MODEL
from saap.console import EVALUATION_HEADER, evaluation_row, print_table, progress, quiet_libraries

CRITERIA = ("saap", "element", "vector", "mask_gradient", "magnitude", "random")


def reload_equals(model: PreTrainedModel, path: Path) -> bool:
    """Whether the checkpoint loads through transformers with bitwise equal logits."""
    loaded = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.arange(64)[None]
    with torch.no_grad():
        return torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.2, help="share of all parameters to remove (default 0.2)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where the pruned model goes")
    args = parser.parse_args()
    quiet_libraries()
    console = Console()
    start = time.time()

    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    dense = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    text = SMALL_MODEL / "report.jsonl"
    console.print(f"[bold]SAAP {saap.__version__}[/]: removing {args.ratio:.0%} of {SMALL_MODEL.name}'s parameters")
    with progress("calibrating", "sequences") as bar:
        statistics = saap.calibrate(dense, tokenizer, SMALL_MODEL / "calibration.jsonl", progress=bar)

    rows: list[tuple[str, saap.Evaluation]] = []
    with console.status("evaluating") as status:
        for criterion in CRITERIA:
            status.update(f"evaluating {criterion}")
            plan = saap.search(saap.score(statistics, criterion), args.ratio)
            pruned = saap.compact(dense, plan, copy=True)
            if criterion == "saap":
                saap.save(pruned, args.out, tokenizer=tokenizer, force=True)
                equal = reload_equals(pruned, args.out)
            result = saap.evaluate(pruned, tokenizer, text, against=dense if not rows else None)
            if not rows:
                assert result.against is not None
                rows.append(("dense", result.against))
            rows.append((criterion, result))
        status.update("least squares")
        compensated = saap.prune(
            copy.deepcopy(dense), tokenizer, SMALL_MODEL / "calibration.jsonl", ratio=args.ratio, statistics=statistics,
            compensate="least_squares",
        ).model  # fmt: skip
        rows.insert(1, ("saap, least squares", saap.evaluate(compensated, tokenizer, text)))
    print_table(
        f"{args.ratio:.0%} removed, one calibration, held-out text",
        EVALUATION_HEADER,
        [evaluation_row(name, result) for name, result in rows],
    )
    console.print(f"dense :  {rows[0][1].sample!r}")
    console.print(f"pruned:  {rows[2][1].sample!r}")
    console.print(f"saved to {args.out}; reloaded with bitwise equal logits: {equal}; {time.time() - start:.0f} s")
    if not equal:
        raise SystemExit("error: the reloaded model's logits differ from the pruned model's")


if __name__ == "__main__":
    main()
