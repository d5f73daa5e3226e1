"""Block streaming against a resident model: anonymous memory, time, and the difference of the statistics.

A random Llama of 4.4 GB in fp32 is written to a temporary folder, then calibrated from its mapped files
with one block at a time ("streamed") and from memory with activation checkpointing ("resident"), each in
a process of its own. Anonymous memory (RssAnon) is what the system cannot drop and read again from a
file; it is counted whole, with the interpreter and its libraries. Hidden states go to files.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import saap
from benchmarks.calibrate_model import device
from benchmarks.common import Row, anonymous_bytes, measure_in_processes, peak_memory
from benchmarks.tasks import run_or_measure

FOLDER = "SAAP_STREAMED_BENCHMARK"  # environment variable: where the checkpoint and the statistics are
SAMPLES, SEQ_LEN, BATCH = 8, 128, 4
VARIANTS = ("streamed", "resident")


def write_checkpoint(folder: Path, quick: bool) -> None:
    """TinyLlama-1.1B's sizes (quick: 19M parameters)."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    if quick:
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **sizes, **heads)
    LlamaForCausalLM._from_config(config, dtype=torch.float32).save_pretrained(folder, max_shard_size="1GB")


def measure_variant(variant: str, quick: bool) -> dict[str, float]:
    """Seconds, peak anonymous bytes and checkpoint bytes of one variant; its statistics go to the folder."""
    folder = Path(os.environ[FOLDER])
    ids = torch.randint(0, 32000, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    options = {"data": ids, "samples": SAMPLES, "seq_len": SEQ_LEN, "batch_size": BATCH}
    before = anonymous_bytes()
    with peak_memory(anonymous_bytes) as peak:
        model = saap.load(folder)
        start = time.perf_counter()
        if variant == "streamed":
            statistics = saap.calibrate(model, **options, stream=saap.Streaming(folder=folder))
        else:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(device(), copy=True)  # out of the mapped files
            model.to(device())
            statistics = saap.calibrate(model, **options, checkpoint=True, stream=False)
        seconds = time.perf_counter() - start
    statistics.save(folder / f"{variant}.stats.safetensors")
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    on_device = torch.cuda.max_memory_allocated() if device() == "cuda" else 0
    return {
        "seconds": seconds, "anonymous": float(before + peak()), "checkpoint": float(size), "device": float(on_device)
    }  # fmt: skip


def largest_difference(folder: Path) -> float:
    """Largest difference of the two variants' statistics, relative to the largest value of its kind."""
    one, two = (saap.Statistics.load(folder / f"{variant}.stats.safetensors") for variant in VARIANTS)
    found = 0.0
    for name, module in one.modules.items():
        for key, tensor in module.tensors().items():
            gap = (tensor - two.modules[name].tensors()[key]).abs().max() / tensor.abs().max()
            found = max(found, float(gap))
    return found


def measure(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="saap-streamed-") as name:
        os.environ[FOLDER] = name
        command = "import sys; from pathlib import Path; from benchmarks.calibrate_streamed import write_checkpoint"
        make = f"{command}; write_checkpoint(Path(sys.argv[1]), {quick})"
        subprocess.run([sys.executable, "-c", make, name], check=True, stdout=subprocess.DEVNULL, timeout=900)
        middle = measure_in_processes("calibrate_streamed", VARIANTS, quick, repeats=1)
        difference = largest_difference(Path(name))
    streamed, resident = (middle[variant] for variant in VARIANTS)
    size = f"{streamed['checkpoint'] / 1e9:.2f} GB checkpoint, {SAMPLES} x {SEQ_LEN}"
    share = streamed["anonymous"] / streamed["checkpoint"]
    pair = streamed["anonymous"] / 2**20, resident["anonymous"] / 2**20
    rows = []
    if device() == "cuda":
        memory = streamed["device"] / 2**20, resident["device"] / 2**20
        rows.append(Row.compare(f"{size}: device memory, streamed / resident", *memory, "MiB"))
    limit = "" if quick or device() == "cuda" else "< 0.4"  # a CUDA context is anonymous memory too
    return rows + [
        Row.single(f"{size}: RssAnon / checkpoint", share, "ratio", limit),
        Row.compare(f"{size}: RssAnon, streamed / resident", *pair, "MiB"),
        Row.compare(f"{size}: streamed / resident", streamed["seconds"], resident["seconds"], "s"),
        Row.single(f"{size}: largest difference of statistics", difference, "relative", "== 0"),
    ]


if __name__ == "__main__":
    run_or_measure(__doc__ or "", measure, measure_variant)
