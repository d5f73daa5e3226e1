"""vLLM's engine and its real OpenAI server on pruned and quantised checkpoints: ``make test-vllm``.

Needs vLLM (0.28 or newer) in the environment, and takes minutes; therefore not collected by ``make test``.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import AsyncOpenAI, BadRequestError, OpenAI

import saap
from benchmarks.common import SMALL_MODEL
from tests.saap.test_empty_modules import hollow
from tests.saap.tiny import tiny_tokenizer
from tests.serving.checkpoints import (
    EVEN,
    change_config,
    greedy,
    mixture_checkpoint,
    quantised_checkpoint,
    tiny_checkpoint,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples/serving/vllm.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
START = 600  # seconds until a server must answer: a compiled model on two busy cores
PROMPTS = [[5, 9, 33], [7] * 10, list(range(2, 30))]
COUNT = 12
TINY = {
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32},
    "qwen2": {"head_dim": 32},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32},  # with an attention softcap, and layers with a sliding window of 4
    "phi3": {"hidden_size": 256},  # q, k and v in one, half of each head rotary
    "opt": {"hidden_size": 256, "word_embed_proj_dim": 256},
}  # heads of 32: vLLM's CPU attention takes no smaller ones


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCKS if name == kind]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def process(command: list[str] | str, folder: Path):
    """A command in the background, its output in a file; all that it started ends with the context."""
    with (folder / "log.txt").open("w+") as log:
        running = subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, shell=isinstance(command, str),
            start_new_session=True,
        )  # fmt: skip
        try:
            yield running, lambda: (folder / "log.txt").read_text()
        finally:
            if running.poll() is None:
                os.killpg(running.pid, 15)
                try:
                    running.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(running.pid, 9)


def server_command(model: Path, port: int, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32",
        "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), *options,
    ]  # fmt: skip


@contextmanager
def serving(command: list[str] | str, port: int, folder: Path):
    """A client of the server that ``command`` starts, once it answers."""
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    with process(command, folder) as (running, log):
        deadline = time.monotonic() + START
        while not answers(client):
            assert running.poll() is None and time.monotonic() < deadline, log()
            time.sleep(1)
        yield client


def answers(client: OpenAI) -> bool:
    from openai import APIConnectionError

    try:
        return bool(client.models.list().data)
    except APIConnectionError:
        return False


def completed(client: OpenAI, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Tokens by which the server continues prompts, all in one request."""
    options = {"return_token_ids": True, "ignore_eos": True}
    done = client.completions.create(
        model=client.models.list().data[0].id, prompt=prompts, max_tokens=count, temperature=0, extra_body=options
    )
    return [list(choice.token_ids) for choice in sorted(done.choices, key=lambda choice: choice.index)]


def engine(folder: Path, cases: list[dict], **environment: str) -> list[dict]:
    """What the engine makes of each case, all in one process."""
    file = folder / "cases.json"
    file.write_text(json.dumps([{"prompts": PROMPTS, "count": COUNT} | case for case in cases]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.vllm_offline", str(file)],
        cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    found = [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if "ANSWER " in line]
    assert len(found) == len(cases), done.stdout + done.stderr
    return found


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """The page's model: made by its first command."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    done = subprocess.run(blocks("sh")[1], shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "small-40"


@pytest.fixture(scope="module")
def page_server(pruned):
    """The page's server, on a free port."""
    port = free_port()
    command = blocks("sh")[2].replace("8000", str(port))
    assert str(port) in command
    with serving(command, port, pruned.parent) as client:
        yield client


def test_the_pages_model_has_layers_of_different_sizes(pruned) -> None:
    layers = json.loads((pruned / "config.json").read_text())["per_layer_config"].values()
    for size in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert len({layer.get(size) for layer in layers}) > 1


def test_the_page_says_what_comes(page_server) -> None:
    script = blocks("python")[0].replace("8000", str(page_server.base_url.port))
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, blocks("text")[0]), done.stderr


def test_32_requests_at_once_get_the_tokens_of_transformers(page_server, pruned) -> None:
    prompts = [[(17 * i + 5 * j) % 4000 + 2 for j in range(1 + (i * 37) % 400)] for i in range(32)]
    counts = [8 + i % 24 for i in range(32)]
    client = AsyncOpenAI(base_url=str(page_server.base_url), api_key="none", max_retries=0, timeout=300)

    async def ask(prompt: list[int], count: int) -> list[int]:
        extra = {"return_token_ids": True, "ignore_eos": True}
        done = await client.completions.create(
            model=page_server.models.list().data[0].id, prompt=prompt, max_tokens=count, temperature=0, extra_body=extra
        )
        return list(done.choices[0].token_ids)

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*map(ask, prompts, counts))

    found = asyncio.run(ask_all())
    wanted = [tokens[:count] for tokens, count in zip(greedy(pruned, prompts, max(counts)), counts, strict=True)]
    assert found == wanted


def test_a_request_beyond_the_context_is_a_400(page_server) -> None:
    with pytest.raises(BadRequestError, match="512"):
        completed(page_server, [[5] * 600], 4)
    assert len(completed(page_server, [[5] * 10], 4)[0]) == 4  # the server is still there


def test_a_client_that_goes_mid_stream_leaves_the_server_up(page_server, pruned) -> None:
    model = page_server.models.list().data[0].id
    stream = page_server.completions.create(
        model=model, prompt=[5, 9], max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert completed(page_server, PROMPTS, COUNT) == greedy(pruned, PROMPTS, COUNT)


def test_a_port_in_use_is_said(page_server, pruned, tmp_path) -> None:
    command = server_command(pruned, page_server.base_url.port, "--enforce-eager")
    with process(command, tmp_path) as (running, log):
        assert running.wait(START) != 0
        assert "ddress already in use" in log()
    assert completed(page_server, [[5] * 10], 4)  # by the first server


def test_a_truncated_checkpoint_ends_the_server(pruned, tmp_path) -> None:
    shutil.copytree(pruned, tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    with process(server_command(tmp_path / "cut", free_port(), "--enforce-eager"), tmp_path) as (running, log):
        assert running.wait(START) != 0
        assert "model.safetensors is not a complete safetensors file" in log()


@pytest.mark.parametrize(
    ("bits", "group_size", "options"),
    [(8, 128, ["--enforce-eager"]), (4, 32, [])],  # int4 by torch.compile
)
def test_a_quantised_server_gives_the_tokens_of_its_weights(pruned, tmp_path, bits, group_size, options) -> None:
    stored, plain = quantised_checkpoint(pruned, tmp_path / "stored", bits, group_size)
    port = free_port()
    with serving(server_command(stored, port, *options), port, tmp_path) as client:
        prompts = [[(31 * i + 3 * j) % 4000 + 2 for j in range(1 + 29 * i)] for i in range(8)]
        assert completed(client, prompts, 16) == greedy(plain, prompts, 16)


def test_every_family_gives_the_tokens_of_transformers(tmp_path) -> None:
    """Layers of different heads, KV heads and widths; of mixtures, different heads."""
    plain = [tiny_checkpoint(tmp_path / family, family, **options) for family, options in TINY.items()]
    plain += [mixture_checkpoint(tmp_path / family, family) for family in ("mixtral", "qwen3_moe")]
    found = engine(tmp_path, [{"model": str(folder)} for folder in plain])
    for folder, answer in zip(plain, found, strict=True):
        assert answer.get("tokens") == greedy(folder, PROMPTS, COUNT), (folder.name, answer)


def test_quantised_checkpoints_of_every_layout(tmp_path) -> None:
    """Fused and single Linears, biases, groups that end within a row, stock models of vLLM's own classes."""
    pairs = []
    for family, bits, group in (
        ("llama", 4, 64), ("qwen3", 8, 32), ("phi3", 4, 32), ("opt", 8, 64), ("gemma2", 4, 32), ("mistral", 8, 128),
    ):  # fmt: skip
        source = tiny_checkpoint(tmp_path / family, family, **TINY[family])
        pairs.append(quantised_checkpoint(source, tmp_path / f"{family}-{bits}", bits, group))
    for model in (SMALL_MODEL, SMALL_MODEL.with_name("small_qwen2")):
        pairs.append(quantised_checkpoint(model, tmp_path / f"{model.name}-4", 4, 32))
    found = engine(tmp_path, [{"model": str(stored)} for stored, _ in pairs])
    for (stored, plain), answer in zip(pairs, found, strict=True):
        assert answer.get("tokens") == greedy(plain, PROMPTS, COUNT), (stored.name, answer)
        assert answer["linears"]["SaapLinearMethod"] >= 12, stored.name
        assert "UnquantizedLinearMethod" not in answer["linears"], stored.name


def test_two_devices_share_plain_and_quantised_layers(tmp_path) -> None:
    """KV heads copied where there is one; groups of 64 cut to 32 by the shares."""
    even = tiny_checkpoint(tmp_path / "even", "llama", EVEN, head_dim=32, intermediate_size=128)
    stored, plain = quantised_checkpoint(even, tmp_path / "stored", 4, 64)
    cases = [{"model": str(folder), "tensor_parallel_size": 2} for folder in (even, stored)]
    found = engine(tmp_path, cases, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert [answer.get("tokens") for answer in found] == [greedy(each, PROMPTS, COUNT) for each in (even, plain)], found


def test_what_cannot_run_is_refused_by_name(tmp_path) -> None:
    odd = tiny_checkpoint(tmp_path / "odd", "llama", head_dim=32)
    saap.save(hollow("llama", torch.float32), tmp_path / "hollow", tokenizer=tiny_tokenizer())
    stored, _ = quantised_checkpoint(odd, tmp_path / "stored", 4, 32)
    quantisation = json.loads((stored / "config.json").read_text())["quantization_config"]
    faults: list[tuple[Path, dict, str]] = [
        (odd, {"tensor_parallel_size": 2, "refused": True}, "layer 0: tensor_parallel=2 cannot split 3 KV heads"),
        (tmp_path / "hollow", {}, "layer 1 has no MLP"),
        (mixture_checkpoint(tmp_path / "mixture", "mixtral", (16, 8, 16)), {}, "layer 1 has 3 experts of width 8"),
    ]
    for key, value, message in (
        ("bits", 3, "expected bits 4 or 8, got 3"),
        ("version", 2, "expected version 1, got 2"),
        ("group_size", 48, "expected group_size 32 or 64 or 128, got 48"),
        ("group_size", 64, "expected qscale"),
        ("quant_method", "other", "Unknown quantization method: other"),
    ):
        shutil.copytree(stored, tmp_path / f"{key}-{value}")
        folder = change_config(tmp_path / f"{key}-{value}", quantization_config=quantisation | {key: value})
        faults.append((folder, {}, message))
    found = engine(tmp_path, [{"model": str(folder)} | options for folder, options, _ in faults])
    for (folder, _, message), answer in zip(faults, found, strict=True):
        assert message in answer.get("error", ""), (folder.name, answer)
