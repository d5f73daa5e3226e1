"""Which path runs for how many tokens: the rules, measured tables and their files, and measuring."""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from saap_kernels import (
    gated_mlp,
    library_linear,
    linear,
    measure_switch_points,
    pack,
    products,
    reference_linear,
    switch_points,
    use_backend,
)
from saap_kernels.products import BACKENDS, Backend
from saap_kernels.switch_points import LIBRARY, default_rungs, measure, table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAME = table.device_name(CPU)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of switch points, not there yet."""
    path = tmp_path / "folder" / "points.json"
    monkeypatch.setenv("SAAP_SWITCH_POINTS", str(path))
    switch_points.forget()
    yield path
    switch_points.forget()


@pytest.fixture
def planted(monkeypatch, file):
    """Plants a backend for CPU tensors, slow above some tokens, and returns the list of its calls."""
    calls = []

    def plant(most_tokens=16, slow_above=1 << 20, mixed=True):
        def run(op):
            def planted_op(x, *rest):
                calls.append((op, len(x)))
                time.sleep(0.05 if len(x) > slow_above else 0)
                return getattr(reference_linear, op)(x, *rest)

            return planted_op

        module = SimpleNamespace(**{op: run(op) for op in ("linear", "gated_linear", "linear_of_padded")})
        monkeypatch.setitem(sys.modules, "saap_kernels.planted", module)
        alone = {name: BACKENDS[name] for name in (LIBRARY, "reference")}
        monkeypatch.setattr(products, "BACKENDS", {"cpu": Backend("planted", most_tokens, mixed), **alone})
        monkeypatch.setattr(products, "IMPLEMENTED", ("cpu", *alone))
        monkeypatch.setattr(products, "refusal", lambda name, tensors, takes: "")
        switch_points.forget()
        return calls

    return plant


def x_of(tokens, columns=70):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


def path_of(tokens, packed, op="linear"):
    module = products.chosen(op, x_of(tokens, packed.columns), packed)
    return LIBRARY if module is library_linear else "kernel"


def paths(packed, counts=(1, 16, 17, 4096)):
    return [path_of(tokens, packed) for tokens in counts]


QUANTISED, WIDE = pack(torch.ones(9, 70), bits=8), pack(torch.ones(9, 70))
HALF = pack(torch.ones(9, 70, dtype=torch.bfloat16))


def test_unmeasured_kernels_run_few_tokens_and_whatever_would_else_be_copied(planted) -> None:
    planted()
    assert paths(QUANTISED) == paths(HALF) == ["kernel", "kernel", LIBRARY, LIBRARY]
    planted(most_tokens=None)
    assert paths(QUANTISED) == paths(HALF) == ["kernel"] * 4
    assert paths(WIDE) == ["kernel", "kernel", LIBRARY, LIBRARY]  # fp32: a GEMM reads it as it is
    planted(most_tokens=4)
    assert paths(QUANTISED, (1, 4, 5, 16)) == ["kernel", "kernel", LIBRARY, LIBRARY]
    planted(mixed=False)
    assert paths(HALF) == [LIBRARY] * 4  # x is fp32
    planted()
    wide = pack(torch.ones(9, 70, dtype=torch.float64))
    scaled = replace(QUANTISED, scale=QUANTISED.scale.double(), zero=QUANTISED.zero.double())
    assert paths(wide) == paths(scaled) == [LIBRARY] * 4


def test_unmeasured_rules_of_a_gpu() -> None:
    both = {"cuda": 16, "triton": None}
    half, dtype = ((16, "cuda"), (None, LIBRARY)), torch.bfloat16
    assert default_rungs(CUDA, dtype, HALF, both) == half == default_rungs(CUDA, dtype, HALF, {"cuda": 16})
    assert default_rungs(CUDA, dtype, QUANTISED, both) == ((16, "cuda"), (None, "triton"))
    assert default_rungs(CUDA, dtype, QUANTISED, {}) == ((None, LIBRARY),)
    assert default_rungs(CUDA, torch.float32, WIDE, both) == ((None, LIBRARY),)


@pytest.mark.parametrize("instructions", [False, True])
def test_unmeasured_16_bit_weights_go_to_the_library_of_a_cpu_that_multiplies_them(monkeypatch, instructions) -> None:
    monkeypatch.setattr(switch_points, "multiplies", lambda dtype: instructions)
    above = LIBRARY if instructions else "cpu"
    assert default_rungs(CPU, torch.bfloat16, HALF, {"cpu": None}) == ((16, "cpu"), (None, above))
    assert default_rungs(CPU, torch.float32, HALF, {"cpu": None}) == ((16, "cpu"), (None, "cpu"))


def test_what_is_asked_for_runs_as_many_tokens_as_it_takes(planted) -> None:
    calls = planted()
    with use_backend("cpu"):
        assert paths(WIDE) == ["kernel", "kernel", LIBRARY, LIBRARY]
        linear(x_of(3), WIDE)
        linear(x_of(17), WIDE)
    assert calls == [("linear", 3)]
    planted(mixed=False)
    with use_backend("cpu"):
        linear(x_of(3), HALF)
    for name in ("library", "reference"):
        with use_backend(name):
            linear(x_of(3), QUANTISED)
    assert len(calls) == 1


def write(rungs, packed=QUANTISED, device=NAME):
    kind = switch_points.key("linear", torch.float32, packed)
    table.write(table.location(), device, {kind: rungs})
    switch_points.forget()


def test_a_measured_table_is_used_by_every_op(planted, file) -> None:
    calls = planted(most_tokens=None)
    write(((2, LIBRARY), (5, "cpu"), (None, LIBRARY)))
    assert paths(QUANTISED, (1, 2, 3, 5, 6)) == [LIBRARY, LIBRARY, "kernel", "kernel", LIBRARY]
    up = pack(torch.ones(2, 70, 9))
    for tokens in (2, 3, 6):
        gated_mlp(x_of(tokens, 9), up, QUANTISED, activation="silu")
    assert [call for call in calls if call[0] != "gated_linear"] == [("linear_of_padded", 3)]
    other = pack(torch.ones(9, 70), bits=4)
    assert paths(other) == ["kernel"] * 4  # not measured: by the rule
    assert json.loads(file.read_text())["devices"].keys() == {NAME}


def test_tables_of_other_devices_stay_and_are_not_used(planted, file) -> None:
    planted()
    write(((None, LIBRARY),), device="other")
    assert paths(QUANTISED)[0] == "kernel" and "not measured" in switch_points.status("cpu")
    write(((8, "cpu"), (None, LIBRARY)))
    assert paths(QUANTISED, (8, 9)) == ["kernel", LIBRARY]
    assert json.loads(file.read_text())["devices"].keys() == {"other", NAME}
    assert list(file.parent.iterdir()) == [file]  # nothing is left beside it


def test_another_number_of_threads_is_another_device(planted, file) -> None:
    planted()
    write(((None, LIBRARY),))
    assert paths(QUANTISED)[0] == LIBRARY
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert paths(QUANTISED)[0] == "kernel"
    finally:
        torch.set_num_threads(before)
    assert paths(QUANTISED)[0] == LIBRARY


@pytest.mark.parametrize("rungs", [((64, "cpu"), (None, LIBRARY)), ((8, "gone"), (None, LIBRARY)), ((None, "cpu"),)])
def test_a_measured_path_that_cannot_run_here_leaves_the_rule(planted, file, rungs) -> None:
    planted()
    write(rungs)
    assert paths(QUANTISED) == ["kernel", "kernel", LIBRARY, LIBRARY]


GOOD = {"kind": table.KIND, "version": table.VERSION, "devices": {}}
FOREIGN = {
    "empty": ("", "expected JSON"),
    "cut": (json.dumps(GOOD)[:-2], "expected JSON"),
    "list": ("[]", 'expected "kind"'),
    "other": ('{"kind": "cookies"}', 'expected "kind"'),
    "version": (json.dumps(GOOD | {"version": 0}), "expected version 1, got 0"),
    "devices": (json.dumps(GOOD | {"devices": []}), "to be an object, got list"),
    "entry": (json.dumps(GOOD | {"devices": {NAME: []}}), 'expected "versions"'),
}
SPOILT = ([], 3, [[4, "cpu"]], [[4, "cpu"], [4, "cpu"], [None, "cpu"]], [[None, 1]], [[True, ""], [None, ""]])
for rungs in SPOILT:
    entry = {NAME: {"versions": "", "points": {"linear": rungs}}}
    FOREIGN[f"rungs {rungs}"] = (json.dumps(GOOD | {"devices": entry}), "expected rising token counts and paths")


@pytest.mark.parametrize("case", FOREIGN)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(planted, file, case) -> None:
    text, reason = FOREIGN[case]
    planted()
    file.parent.mkdir()
    file.write_text(text)
    table._warn.cache_clear()
    with pytest.warns(UserWarning) as caught:
        assert paths(QUANTISED)[0] == "kernel"
    assert len(caught) == 1 and str(file) in str(caught[0].message) and reason in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switch_points.forget()
        assert paths(QUANTISED)[0] == "kernel" and "not measured" in switch_points.status("cpu")
    if case == "version":
        write(((None, LIBRARY),))
        assert paths(QUANTISED)[0] == LIBRARY
    else:
        with pytest.raises(ValueError, match="is not replaced"):
            measure_switch_points("cpu", quick=True)
        assert file.read_text() == text


def test_where_the_file_is(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("SAAP_SWITCH_POINTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.location() == tmp_path / "saap" / "switch_points.json"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert table.location() == tmp_path.home() / ".cache" / "saap" / "switch_points.json"
    monkeypatch.setenv("SAAP_SWITCH_POINTS", "here.json")
    assert str(table.location()) == "here.json"


def test_a_path_takes_over_where_it_is_clearly_faster() -> None:
    def rungs(*kernel):
        return measure.fastest({2**i: [{"cpu": t, LIBRARY: 1.0}] for i, t in enumerate(kernel)})

    assert rungs(0.5, 0.6, 0.9, 1.2, 2.0) == ((4, "cpu"), (None, LIBRARY))
    assert rungs(0.5, 1.01, 0.9, 1.2) == ((4, "cpu"), (None, LIBRARY))  # within noise
    assert rungs(2.0, 3.0) == ((None, LIBRARY),) and rungs(0.5, 0.5) == ((None, "cpu"),)
    mean = {1: [{"cpu": 0.5, LIBRARY: 1.0}, {"cpu": 30.0, LIBRARY: 20.0}]}  # 2 and 2/3 as fast
    assert measure.fastest(mean) == ((None, "cpu"),)
    limited = {16: [{"a": 0.4, "b": 0.5, LIBRARY: 1.0}], 32: [{"b": 0.5, LIBRARY: 1.0}]}
    assert measure.fastest(limited) == ((16, "a"), (None, "b"))


def test_measuring_finds_where_a_kernel_stops_to_win(planted, file, monkeypatch) -> None:
    planted(most_tokens=None, slow_above=16)
    monkeypatch.setattr(measure, "SHAPES", {"linear": ((64, 65),)})
    monkeypatch.setattr(measure, "DTYPES", {"cpu": (torch.bfloat16,)})
    monkeypatch.setattr(measure, "COLD_BYTES", {"cpu": 0})
    monkeypatch.setattr(library_linear, "linear", lambda x, weight, bias: time.sleep(0.01))
    lines = []
    found = measure_switch_points("cpu", quick=True, report=lines.append)
    kinds = {f"linear bfloat16 {stored} small" for stored in ("bfloat16", "int8", "int4")}
    assert found == dict.fromkeys(kinds, ((16, "cpu"), (None, LIBRARY))) and len(lines) == 3
    assert path_of_half(16) == "kernel" and path_of_half(17) == LIBRARY
    assert "measured with torch" in switch_points.status("cpu") and "3 kinds" in switch_points.status("cpu")


def path_of_half(tokens):
    module = products.chosen("linear", x_of(tokens).bfloat16(), HALF)
    return LIBRARY if module is library_linear else "kernel"


def test_measured_shapes_lie_in_their_size_classes() -> None:
    for op, shapes in measure.SHAPES.items():
        lead = (2,) if op == "gated_linear" else ()
        weights = [SimpleNamespace(shape=(*lead, *shape), rows=shape[0], columns=shape[1]) for shape in shapes]
        classes = [switch_points.size_class(weight) for weight in weights]
        assert classes == ["small", "small", "medium", "medium", "large", "large"]
        pairs = zip(shapes[::2], shapes[1::2], strict=True)
        assert all(any(width % 2 for width in (*one, *other)) for one, other in pairs)


def test_devices_that_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="device: expected cuda or cpu, got meta"):
        measure_switch_points("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one that this torch can use, got cuda"):
            measure_switch_points("cuda")


def test_the_command_line_says_what_is_known(tmp_path) -> None:
    command = [sys.executable, "-W", "error", "-m", "saap_kernels.switch_points", "--device", "cpu"]
    environment = os.environ | {"SAAP_SWITCH_POINTS": str(tmp_path / "none.json")}
    done = subprocess.run([*command, "--status"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("not measured: kernels up to 16 tokens"), done.stderr
    (tmp_path / "none.json").write_text("{}")
    done = subprocess.run([*command, "--quick"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "is not replaced" in done.stderr


def test_importing_asks_no_device_and_reads_no_file(tmp_path) -> None:
    code = "import saap_kernels, torch; assert not torch.cuda.is_initialized()"
    (tmp_path / "damaged.json").write_text("")
    environment = os.environ | {"SAAP_SWITCH_POINTS": str(tmp_path / "damaged.json")}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)
