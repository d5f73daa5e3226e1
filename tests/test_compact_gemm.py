"""The GEMM benchmark: its peers compute what the ops do, its widths are every remainder, its bounds are those asked."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import compact_gemm, compact_peers
from benchmarks.compact_figure import Point, draw
from benchmarks.compact_peers import Operands, Product, variants_of
from benchmarks.compact_widths import LAYERS, RATIOS, Mlp, every_residue, plan_widths, typical
from benchmarks.timing import Rates

CPU = Rates(1e12, 1e10, "cpu", torch.float32)
CUDA = Rates(1e15, 4e12, "cuda", torch.bfloat16)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("op", compact_peers.OPS)
def test_every_peer_computes_the_product(op, bits) -> None:
    product = Product(op, Mlp("tiny", 32, 37), 5, bits)
    sets = [Operands(product, CPU, torch.Generator().manual_seed(0))]
    variants, notes = variants_of(product, sets, ("F.linear", "F.linear padded"))
    assert set(variants) == {"ours", "F.linear", "F.linear padded"} and not notes
    found = {name: call(0) for name, call in variants.items()}
    wanted = found["F.linear"]
    padded = found["F.linear padded"]
    assert padded.shape[1] % 64 == 0 and not padded[:, wanted.shape[1] :].any()
    # fp32 sums of at most 37 terms of size one; int8: half a step of 256 on each of them
    error = 1e-5 if bits == 16 else 0.05
    torch.testing.assert_close(padded[:, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["ours"], wanted, rtol=error, atol=error)


def test_peers_that_are_not_installed_are_noted_and_leave_no_row(monkeypatch) -> None:
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(compact_peers, "import_module", absent)
    for op, bits, name in (("gated_mlp", 16, "Liger"), ("up", 8, "torchao")):
        product = Product(op, Mlp("tiny", 32, 37), 5, bits)
        sets = [Operands(product, CPU, torch.Generator().manual_seed(0))]
        variants, notes = variants_of(product, sets, ("Liger", "torchao"))
        assert set(variants) == {"ours"} and len(notes) == 1 and notes[0].startswith(f"{name}: No module named")


def test_widths_are_of_plans_and_every_remainder() -> None:
    for model in LAYERS:
        widths = every_residue(model)
        assert {mlp.width % 16 for mlp in widths} == set(range(16)) and len(widths) == 16
        for ratio in RATIOS:
            found = plan_widths(model, ratio)
            assert len(found) == LAYERS[model] and len(set(found)) > LAYERS[model] // 2
            full = full_width(model)
            assert sum(found) == pytest.approx((1 - ratio) * full * len(found), abs=1)
            assert typical(model, ratio).width % 2 and typical(model, ratio).width in found


def full_width(model: str) -> int:
    return {"Llama-2-7B": 11008, "Llama-3-8B": 14336, "Qwen2.5-7B": 18944}[model]


def asked(product: Product, rates: Rates = CUDA) -> dict[str, str]:
    """What is asked of a product's rows, by what follows its case."""
    peers = [peer for peer in compact_peers.PEERS if peer != "Liger" or product.op == "gated_mlp"]
    seconds = dict.fromkeys(("ours", *peers), 1e-3)
    rows = compact_gemm.rows_of(product, rates, seconds, {})
    return {row.case.removeprefix(product.case): row.asked for row in rows if row.asked}


def test_bounds_are_asked_where_they_hold() -> None:
    up = Product("up", Mlp("a", 4096, 11008), 1, 16)  # 90.2 MB in bf16
    assert asked(up) == {", share of roofline": ">= 0.85"}
    assert asked(replace(up, mlp=Mlp("a", 4096, 4096))) == {", share of roofline": ">= 0.75"}
    assert asked(replace(up, mlp=Mlp("a", 1024, 4096))) == {}
    assert asked(replace(up, bits=4)) == {" / F.linear padded": "<= 0.435"}
    assert asked(replace(up, bits=4, mlp=Mlp("a", 8192, 14336))) == {" / F.linear padded": "<= 0.333"}
    assert asked(replace(up, tokens=2048)) == {" / F.linear padded": "<= 1.020"}
    assert asked(replace(up, op="gated_mlp", tokens=16)) == {" / Liger": "<= 0.909"}
    assert asked(replace(up, bits=8), CPU) == {" / F.linear": "<= 0.500"} and asked(up, CPU) == {}


def test_rates_and_means() -> None:
    product, ratios = Product("up", Mlp("a", 1000, 501), 1, 16), {}
    rows = list(compact_gemm.rows_of(product, CPU, {"ours": 1e-3, "F.linear": 2e-3, "F.linear padded": 4e-3}, ratios))
    values = {row.case.removeprefix(product.case): row.ours for row in rows}
    assert values[", reading"] == pytest.approx(4 * 501000 / 1e-3 / 1e9)
    assert values[", share of roofline"] == pytest.approx(4 * 501000 / 1e10 / 1e-3)
    ratios["up, decode / F.linear"].append(2.0)
    means = {row.case: row for row in compact_gemm._means(ratios, CUDA)}
    assert means["geometric mean of 2: up, decode / F.linear"].ours == pytest.approx(1.0)
    assert means["geometric mean of 2: up, decode / F.linear"].asked == "<= 0.667"
    assert means["geometric mean of 1: up, decode / F.linear padded"].asked == ""
    even = replace(product, mlp=Mlp("a", 1000, 500))
    list(compact_gemm.rows_of(even, CPU, {"ours": 1e-3, "F.linear": 2e-3}, ratios))
    assert len(ratios["up, decode / F.linear"]) == 2  # of odd widths only


def test_the_figure_is_svg_with_a_line_per_variant() -> None:
    points = [
        Point(op, tokens, width, name, 1e-6 * width)
        for op in ("up", "down")
        for tokens in (1, 2048)
        for width in (100, 103, 111)
        for name in ("ours", "F.linear", "F.linear padded", "Liger")
    ]
    root = ElementTree.fromstring(draw(points))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}circle")) == 4 * 3 * 3
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for circle in root.findall(f"{space}circle"):
        assert 0 < float(circle.attrib["cx"]) < width and 0 < float(circle.attrib["cy"]) < height
    assert {"up, 1 tokens, us", "down, 2048 tokens, us", "intermediate width", "F.linear padded"} <= {
        text.text for text in root.iter(f"{space}text")
    }
