"""One training step of recovery: group-wise adapters on int4 and int8 against LoRA through peft on 16-bit weights.

A step is forward, backward and AdamW on one batch of random tokens, as ``saap.recover`` attaches what learns (rank 16,
or as many as there are groups of 32 where zero points learn alone; norms too); the models take turns, medians are
compared. The shipped Llama, and a wider random one, each
without half of its blocks' parameters, units chosen at random. On a CPU weights of LoRA are fp32, which is the faster
there, and count as the 16 bits that they have in a checkpoint; on a GPU a stack of Llama-2-7B's layers in bf16, in
tokens per second, and peer memory as measured.
"""

import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import saap
from benchmarks.common import Row
from benchmarks.criteria import load_model
from benchmarks.end_to_end import device, random_scores
from benchmarks.tasks import run
from benchmarks.timing import peaks
from saap.packed_linear import held_bytes
from saap.recovery.attach import attach, decoder_linears
from saap.recovery.settings import Settings
from saap.units import discover

RANK, GROUP = 16, 32
VARIANTS = {  # name: bits, levels
    "int4": (4, True),
    "int4, zero points alone": (4, False),
    "int8": (8, True),
    "int8, zero points alone": (8, False),
}


@dataclass(frozen=True)
class Case:
    """A pruned model in the dtype that LoRA trains it in, and the (sequences, tokens) of a step."""

    name: str
    model: PreTrainedModel
    batch: tuple[int, int]
    repeats: int


class Step:
    """What learns in a model by some settings, and one step of it."""

    def __init__(self, model: PreTrainedModel, settings: Settings, batch: tuple[int, int]) -> None:
        self.model = attach(model, settings).model.train()
        learned = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, model.config.vocab_size, batch, generator=generator).to(model.device)

    def __call__(self, _: int = 0) -> None:
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def cases(quick: bool) -> Iterator[Case]:
    if not torch.cuda.is_available():
        shipped, _ = load_model()
        yield Case("shipped Llama", half_of(shipped.float()), (1, 64) if quick else (4, 256), 3 if quick else 9)
    if quick:
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 512}
        yield Case("3M Llama", half_of(random_llama(sizes, 8)), (1, 64), 3)
    elif torch.cuda.is_available():
        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "vocab_size": 32000}
        yield Case("8 layers of Llama-2-7B", half_of(random_llama(sizes, 32)), (4, 1024), 9)
    else:
        sizes = {"hidden_size": 1024, "intermediate_size": 5400, "num_hidden_layers": 4, "vocab_size": 2048}
        yield Case("86M Llama", half_of(random_llama(sizes, 16)), (4, 256), 4)


def random_llama(sizes: dict[str, int], heads: int) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with torch.device(device()):
        return LlamaForCausalLM._from_config(LlamaConfig(num_attention_heads=heads, **sizes), dtype=dtype)


def half_of(model: PreTrainedModel) -> PreTrainedModel:
    """Without half of the blocks' parameters: layers of different, odd widths."""
    plan = saap.search(random_scores(discover(model)), 0.5, ratio_of="blocks", multiple=1)
    return saap.compact(model, plan)


def seconds(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """{name: median seconds of a step}, turns alternating."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            wait()
            if repeat:  # the first one allocates
                found[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in found.items()}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(quick: bool) -> Iterator[Row]:
    threads = torch.get_num_threads()
    for case in cases(quick):
        yield from memory_rows(case)
        steps = {
            name: Step(
                saap.quantise(copy.deepcopy(case.model), bits=bits, group_size=GROUP),
                Settings(bits=bits, levels=levels, rank=RANK if levels else fewest_groups(case), group_size=GROUP),
                case.batch,
            )
            for name, (bits, levels) in VARIANTS.items()
        }
        steps["lora"] = Step(case.model, Settings(method="lora", bits=None, rank=RANK), case.batch)
        try:
            for count in (1,) if quick or torch.cuda.is_available() else (1, 2):
                if count <= (os.cpu_count() or 1):
                    torch.set_num_threads(count)
                    yield from rows(case, steps)
        finally:
            torch.set_num_threads(threads)


def memory_rows(case: Case) -> Iterator[Row]:
    """Of weights that a step leaves as they are, of a model in bf16."""
    model = copy.deepcopy(case.model).bfloat16()
    plain = sum(linear.weight.nbytes for linear in linears(model))
    for bits in (4, 8):
        packed = held_bytes(saap.quantise(copy.deepcopy(model), bits=bits, group_size=GROUP))
        title = f"{case.name}: frozen weights of Linears, int{bits} / bf16"
        yield Row.compare(title, packed / 2**20, plain / 2**20, "MiB", "<= 0.5")


def fewest_groups(case: Case) -> int:
    """The rank that zero points alone have room for, up to that of the others."""
    return min(RANK, *(-(-linear.in_features // GROUP) for linear in linears(case.model)))


def linears(model: PreTrainedModel) -> list[torch.nn.Linear]:
    return [model.get_submodule(name) for name in decoder_linears(model)]  # type: ignore[misc]  # all Linears


def rows(case: Case, steps: dict[str, Step]) -> Iterator[Row]:
    found = seconds(steps, case.repeats)
    tokens = case.batch[0] * case.batch[1]
    shape = f"{case.batch[0]} x {case.batch[1]} tokens"
    for name in VARIANTS:
        title = f"{case.name}, {shape}: a step of {name} / peft LoRA"
        if torch.cuda.is_available():
            yield Row.compare(title, tokens / found[name], tokens / found["lora"], "tok/s", ">= 1.0")
        else:
            title = f"{title}, {torch.get_num_threads()} threads"
            yield Row.compare(title, 1e3 * found[name], 1e3 * found["lora"], "ms", "<= 1.2")
    taken = peaks(steps, device())
    for name in VARIANTS:
        yield Row.compare(f"{case.name}, {shape}: memory above its weights, {name} / LoRA", *(
            taken[each] / 2**20 for each in (name, "lora")), "MiB")  # fmt: skip


if __name__ == "__main__":
    run(__doc__ or "", measure)
