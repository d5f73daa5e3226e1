"""``saap recover`` on a tiny model: what it writes, prints, refuses and leaves behind."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import models

import saap
from saap import console
from tests.saap.command_line import run
from tests.saap.test_card import card
from tests.saap.test_distributed import RUN
from tests.saap.tiny import tiny_model, tiny_tokenizer

SMALL = ("--seq-len", 16, "--batch-size", 4, "--rank", 2, "--learning-rate", 0.005)
LETTERS = "the quick brown fox jumps over lazy dogs. "


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    saap.save(tiny_model("llama", torch.float32), folder / "dense", tokenizer=tiny_tokenizer())
    (folder / "text.txt").write_text("\n\n".join(LETTERS[i:] + LETTERS[:i] for i in range(30)))
    (folder / "held.txt").write_text("\n\n".join(LETTERS[i:] + LETTERS[:i] for i in range(30, 36)))
    run("prune", folder / "dense", "--data", folder / "text.txt", "--samples", 4, "--seq-len", 16, "--multiple", 8,
        "--ratio", 0.2, "--out", folder / "pruned")  # fmt: skip
    return folder


def recover(folder: Path, *arguments: object, code: int = 0):
    return run("recover", folder / "pruned", "--data", folder / "text.txt", *SMALL, *arguments, code=code)


def test_a_pruned_model_is_recovered_evaluated_and_described(workplace, tmp_path) -> None:
    held = workplace / "held.txt"
    result = recover(
        workplace, "--out", tmp_path / "out", "--teacher", workplace / "dense", "--bits", 4, "--eval", held,
        "--held-out", held,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    rows = [name for name in ("dense", "pruned", "out") if any(f" {name} " in line for line in lines)]
    assert rows == ["dense", "pruned", "out"] and "int4 in groups of 32, rounded by gptq" in result.stdout
    assert "distillation from dense over its 64 likeliest tokens" in result.stdout
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]  # no checkpoints are left
    model = saap.load(tmp_path / "out")
    assert model.is_quantized and (tmp_path / "out/tokenizer.json").is_file()
    assert (tmp_path / "out/saap_plan.json").read_bytes() == (workplace / "pruned/saap_plan.json").read_bytes()
    found = card(tmp_path / "out")
    for row in ("| dense |", "| pruned |", "| recovered |", "| tuned on | text.txt |", "| recovery | groupwise: zero "):
        assert row in found.text
    assert "Recovered pruned" in found.text and "int4 in groups of 32" in found.text
    assert "saap recover pruned --data text.txt --teacher dense --bits 4" in found.text
    assert str(tmp_path) not in found.content and str(workplace) not in found.content
    page = (tmp_path / "out/saap_report.html").read_text()
    assert 'id="losses"' in page and "Held-out loss" in page and str(tmp_path) not in page


def test_json_says_what_came_out(workplace, tmp_path) -> None:
    result = recover(workplace, "--out", tmp_path / "out", "--method", "lora", "--json", "--no-report", "--epochs", 2)
    found = json.loads(result.stdout)
    assert found["settings"]["bits"] is None and found["settings"]["objective"] == "next_token"
    assert found["steps"] == len(found["losses"]) and found["tokens"] == found["steps"] * 4 * 16
    assert found["evaluation"] is None and found["report"] is None and not (tmp_path / "out/saap_report.html").exists()
    assert found["held_out_sequences"] == 16 and found["sequences"] > 48
    assert set(found["timings"]) >= {"train", "save"}
    assert saap.load(tmp_path / "out").config.model_type.startswith("saap")


def test_a_teacher_must_have_the_models_vocabulary_and_lends_its_tokenizer(workplace, tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = {token: (index + 1) % 64 for token, index in tokenizer.get_vocab().items()}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[])
    saap.save(tiny_model("llama", torch.float32), tmp_path / "other", tokenizer=tokenizer)
    refused = recover(workplace, "--teacher", tmp_path / "other", "--out", tmp_path / "out", code=2)
    assert "expected a teacher with the model's tokenizer" in refused.stderr
    saap.save(saap.load(workplace / "pruned"), tmp_path / "bare")
    arguments = ("--data", workplace / "text.txt", "--teacher", workplace / "dense", *SMALL, "--epochs", 0.3)
    alone = run("recover", tmp_path / "bare", *arguments[:2], *SMALL, "--out", tmp_path / "out", code=2)
    assert f"expected a tokenizer in {tmp_path / 'bare'}, found none" in alone.stderr
    run("recover", tmp_path / "bare", *arguments, "--objective", "next_token", "--out", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").is_file() and "| objective | next token |" in card(tmp_path / "out").text


def test_a_quantised_directory_is_tuned_as_it_is(workplace, tmp_path) -> None:
    run("export", workplace / "pruned", "--quantised", "int8", "--group-size", 64, "--out", tmp_path / "q")
    arguments = ("--data", workplace / "text.txt", *SMALL, "--epochs", 0.3, "--group-size", 64)
    refused = run("recover", tmp_path / "q", *arguments, "--out", tmp_path / "out", code=2)
    assert (
        "expected settings of int8 in groups of 64 (--bits 8 --group-size 64), as model.layers.0.self_attn.q_proj is, "
        "got int4 in groups of 64" in refused.stderr
    )
    asked = (*arguments, "--bits", 8, "--out", tmp_path / "out")
    dry = json.loads(run("recover", tmp_path / "q", *asked, "--dry-run", "--json").stdout)
    assert dry["parameters"] == saap.load(workplace / "pruned").num_parameters()  # quantised weights too
    told = run("recover", tmp_path / "q", *asked).stdout
    assert "int8 in groups of 64, as it came" in told and saap.load(tmp_path / "out").is_quantized


def test_a_dense_models_card_does_not_call_it_pruned(workplace, tmp_path) -> None:
    arguments = ("--data", workplace / "text.txt", *SMALL, "--epochs", 0.3, "--held-out", 0)
    run("recover", workplace / "dense", *arguments, "--out", tmp_path / "[b]out[/i]")  # no markup
    found = ModelCard.load(tmp_path / "[b]out[/i]/README.md")
    assert "pruned" not in found.text.lower() and found.data.tags == ["saap"]
    assert "tuned on text with SAAP" in found.text and ", none held out |" in found.text


def test_a_dry_run_says_what_would_be_done_and_does_nothing(workplace, tmp_path) -> None:
    result = recover(workplace, "--out", tmp_path / "out", "--dry-run", "--json", "--tokens", 500)
    found = json.loads(result.stdout)
    assert (found["steps"], found["tokens"]) == (7, 448) and found["objective"] == "next_token"
    assert found["sequences"] == 32 and found["held_out_sequences"] == 16
    assert list(tmp_path.iterdir()) == []
    assert found["learning_rate"] == 0.005
    told = recover(workplace, "--out", tmp_path / "out", "--dry-run").stdout
    assert "nothing was done" in told and "\nlevels: yes\n" in told and f"\noutputs: {tmp_path / 'out'}\n" in told
    refused = recover(workplace, "--out", tmp_path / "out", "--dry-run", "--rank", 99, code=2)
    assert "rank: expected at most" in refused.stderr


def test_bits_16_are_none(workplace, tmp_path) -> None:
    options = ("--seq-len", 16, "--batch-size", 4, "--learning-rate", 0.001, "--out", tmp_path / "out")
    run("recover", workplace / "pruned", "--data", workplace / "text.txt", "--method", "full", "--bits", 16, *options)
    assert saap.load(tmp_path / "out").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 5), "--bits: expected 4, 8 or 16; got 5"),
        (("--bits", 16), "method groupwise tunes quantised weights: expected bits 8 or 4, got None (--bits 16)"),
        (("--method", "full", "--bits", 4), "expected bits None (--bits 16), got 4"),
        (
            ("--hidden", 1, "--next-token", 1),
            "next_token (--next-token) belongs to objective distillation",
        ),
        (("--objective", "distillation"), "expected teacher (--teacher), got none"),
        (("--held-out", "none.txt"), "no such file: none.txt"),
        (("--eval", "none.txt"), "no such file: none.txt"),
        (("--resume",), "no training to go on from"),
        (("--micro-batch", 3), "micro_batch: expected a divisor of batch_size 4, got 3"),
        (("--seq-len", 1000), "seq_len: expected at most the 64 positions of the model, got 1000"),
        (("--seq-len", 64, "--held-out", 0.99), "expected a share that leaves sequences to train on"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(workplace, tmp_path, arguments, message: str) -> None:
    result = recover(workplace, "--out", tmp_path / "out", *arguments, code=2)
    assert message in result.stderr.replace("\n", " ") and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_refused_before_anything_is_loaded(workplace, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("saap.recovery.job.open_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    assert "exists already" in recover(workplace, "--out", tmp_path / "out", code=2).stderr
    nothing = run("recover", "nothing", "--data", workplace / "text.txt", "--out", tmp_path / "new", code=2)
    assert "no such model directory: nothing" in nothing.stderr  # and nobody asks the hub
    own = recover(workplace, "--teacher", workplace / "pruned", "--out", tmp_path / "new", code=2)
    assert "expected the dense model, got the one to tune itself" in own.stderr
    itself = recover(workplace, "--out", workplace / "pruned", "--force", code=2)
    assert "is the model itself" in itself.stderr
    inside = recover(workplace, "--out", workplace / "text.txt/new/out", code=2)
    assert "text.txt is a file; expected a directory to write" in inside.stderr
    with monkeypatch.context() as patched:
        patched.setattr("saap.checkpoint.os.access", lambda path, mode: Path(path) != tmp_path)
        assert f"cannot write in {tmp_path}: " in recover(workplace, "--out", tmp_path / "a/b", code=2).stderr
    for option in ("--teacher", "--held-out", "--eval"):
        (tmp_path / "inputs").mkdir(exist_ok=True)
        (tmp_path / "inputs/text.txt").write_text("abc")
        path = tmp_path / "inputs" / ("" if option == "--teacher" else "text.txt")
        for out in {path, tmp_path / "inputs", tmp_path}:
            lost = recover(workplace, option, path, "--out", out, "--force", code=2).stderr
            assert "would be lost" in lost, (option, out)
    assert (tmp_path / "inputs/text.txt").exists()
    monkeypatch.chdir(tmp_path)
    for out in (".", "/"):
        assert (
            "expected the name of a directory of its own" in recover(workplace, "--out", out, "--force", code=2).stderr
        )
    (tmp_path / "new.training").mkdir()
    (tmp_path / "new.training/mine").write_text("")
    assert "holds an earlier training" in recover(workplace, "--out", tmp_path / "new", code=2).stderr
    forced = recover(workplace, "--out", tmp_path / "new", "--force", code=2)
    assert "is no folder of checkpoints: it holds mine" in forced.stderr and (tmp_path / "new.training/mine").exists()


def test_a_failed_save_keeps_the_training_and_resume_goes_on_from_it(workplace, tmp_path, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("saap.recovery.job.save", full)
        assert "No space left" in recover(workplace, "--out", tmp_path / "out", code=2).stderr
    assert [each.name for each in tmp_path.iterdir()] == ["out.training"]
    with monkeypatch.context() as patched:  # before anything is loaded, and not one line for every tensor
        patched.setattr("saap.recovery.job.open_model", lambda *_: pytest.fail("loaded"))
        refused = recover(workplace, "--out", tmp_path / "out", "--resume", "--rank", 1, code=2)
    assert refused.stderr.endswith("out.training, which was another one: settings.rank: 2 -> 1\n")
    recover(workplace, "--out", tmp_path / "out", "--resume")
    recover(workplace, "--out", tmp_path / "again")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["again", "out"]
    ids = torch.arange(16)[None]
    assert torch.equal(saap.load(tmp_path / "out")(ids).logits, saap.load(tmp_path / "again")(ids).logits)


def test_force_starts_anew_over_what_a_training_left(workplace, tmp_path, monkeypatch) -> None:
    def stop(*_, **__) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["saap.recovery.job"], "save", stop)
        recover(workplace, "--out", tmp_path / "out", code=130)
    recover(workplace, "--out", tmp_path / "out", "--force")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_two_processes_train_as_one_does_and_the_first_saves(workplace, tmp_path) -> None:
    options = ["--json", "--epochs", "1", "--teacher", workplace / "dense", "--eval", workplace / "held.txt"]
    one = json.loads(recover(workplace, *options, "--out", tmp_path / "one").stdout)
    command = [*RUN, "recover", workplace / "pruned", "--data", workplace / "text.txt", *SMALL, *options]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # of one process alone
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "two"]
    # fp32 sums of other halves, and levels that flip at a rounding's edge: losses of about 1 to 4
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-2)
    assert two["evaluation"]["loss"] == pytest.approx(one["evaluation"]["loss"], rel=1e-2)
    assert two["best_step"] == one["best_step"]


def test_the_bar_tells_the_stage_and_the_live_loss(workplace, tmp_path, monkeypatch) -> None:
    heard: list[tuple] = []

    class Bar:
        def __call__(self, done: int, total: int) -> None:
            heard.append((done, total))

        def say(self, title: str) -> None:
            heard.append((title,))

    @contextmanager
    def progress(title: str, unit: str | None, shown: bool = True):
        heard.append(("begin", title, unit))
        yield Bar()
        heard.append(("end", title))

    monkeypatch.setattr(console, "progress", progress)
    found = json.loads(recover(workplace, "--out", tmp_path / "out", "--epochs", 0.3, "--json").stdout)
    steps = found["steps"]
    stages = [each for each in heard if each[0] in ("begin", "end")]
    assert stages == [
        ("begin", "quantising", "modules"), ("end", "quantising"), ("begin", "training", "steps"), ("end", "training"),
    ]  # fmt: skip
    assert [each[0] for each in heard if len(each) == 1] == [f"training, loss {loss:.4g}" for loss in found["losses"]]
    assert heard[-2] in [(steps, steps), (f"training, loss {found['losses'][-1]:.4g}",)] and steps > 1
