"""Seven zero-shot tasks through lm_eval, on the hub's rows or on a folder of local ones."""

import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Where lm_eval keeps each task, and the accuracy that the published tables print: normalised by the length of the
# answer where the task has it (LLM-Pruner, FLAP), plain for yes or no and for two fillings of one blank.
TASKS = {
    "boolq": ("super_glue/boolq", "acc"),
    "piqa": ("piqa", "acc_norm"),
    "hellaswag": ("hellaswag", "acc_norm"),
    "winogrande": ("winogrande", "acc"),
    "arc_easy": ("arc", "acc_norm"),
    "arc_challenge": ("arc", "acc_norm"),
    "openbookqa": ("openbookqa", "acc_norm"),
}
SPLITS = ("train", "validation", "test")


def check_tasks(tasks: tuple[str, ...], folder: Path | None) -> None:
    """Raise ValueError for tasks that are not of the seven or appear twice, FileNotFoundError for missing rows."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"--tasks: unknown task {', '.join(map(repr, unknown))}; known: {', '.join(TASKS)}")
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"--tasks: expected different tasks; got {','.join(tasks)}")
    for task in tasks if folder is not None else ():
        if not rows_file(folder, task).is_file():
            raise FileNotFoundError(f"--task-folder: expected the rows of {task} in {rows_file(folder, task)}")


def rows_file(folder: Path, task: str) -> Path:
    return folder / f"{task}.jsonl"


def lm_eval_version() -> str:
    """The installed version; raises ValueError when there is none."""
    try:
        return version("lm_eval")
    except PackageNotFoundError as error:
        raise ValueError('the zero-shot tasks need lm_eval: pip install "saap[eval]"') from error


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: tuple[str, ...],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """{task: {"rows", "acc", "acc_stderr" and, where the task has it, "acc_norm", "acc_norm_stderr"}}, no examples.

    Prompts, answers and metrics are lm_eval's own tasks; with ``folder`` their rows come from TASK.jsonl there, in the
    format of the hub's data set. ``limit`` takes the first rows of each task only. BOS as the tokenizer adds it.
    """
    import datasets
    import lm_eval
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns of the model object and the fixed examples: both meant
    datasets.disable_progress_bars()
    root = Path(lm_eval.tasks.__file__).parent
    # only these folders: reading all of lm_eval's tasks takes longer than evaluating a small model
    folders = sorted({str(root / TASKS[task][0]) for task in tasks})
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    # members of a group may override what their task says, here where the rows are
    group = {"group": "protocol", "task": [{"task": task} | _local_rows(folder, task) for task in tasks]}
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
        tasks=[group], task_manager=manager, num_fewshot=0, limit=limit, log_samples=False,
    )  # fmt: skip
    return {task: _numbers(found["results"][task], found["n-samples"][task]["effective"]) for task in tasks}


def _local_rows(folder: Path | None, task: str) -> dict[str, Any]:
    if folder is None:
        return {}
    file = str(rows_file(folder, task).resolve())
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": dict.fromkeys(SPLITS, file)}}


def _numbers(results: dict[str, Any], rows: int) -> dict[str, float]:
    plain = {name.removesuffix(",none"): value for name, value in results.items()}  # "none" is lm_eval's null filter
    kept = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    return {"rows": rows} | {name: plain[name] for name in kept if name in plain}
