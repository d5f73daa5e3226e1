"""Fluctuation from moments against the same from one calibration per sequence."""

import pytest
import torch

import saap
from saap.fluctuation import fluctuation
from saap.statistics import ORDERS
from tests.saap.tiny import tiny_model

SEQUENCES = 6


@pytest.fixture(scope="module")
def measured():
    model = tiny_model("llama")
    ids = torch.randint(0, 64, (SEQUENCES, 12), generator=torch.Generator().manual_seed(3))
    together = saap.calibrate(model, None, ids, samples=SEQUENCES, seq_len=12)
    return together, [saap.calibrate(model, None, row[None], samples=1, seq_len=12) for row in ids]


def rows(each, module: str, kind: str, order: str, row: int) -> torch.Tensor:
    """Importance per sequence, (S, U)."""
    index = ORDERS.index(order)
    return torch.stack([getattr(one.modules[module].salience, f"{kind}_mean")[index, row] for one in each])


def spread(values: torch.Tensor) -> torch.Tensor:
    return values.std(0) / values.mean(0)


@pytest.mark.parametrize("module", ["attention", "mlp"])
@pytest.mark.parametrize(
    ("criterion", "options", "row"),
    [
        ("vector", {"order": "first"}, -1),
        ("element", {"order": "mixed", "aggregation": "joint"}, -2),
        ("mask_gradient", {}, -3),
    ],
)
def test_one_importance_is_exact(measured, module: str, criterion: str, options: dict, row: int) -> None:
    together, each = measured
    settings = saap.score(together, criterion, **options).settings
    found = fluctuation(together, settings)
    assert found is not None and found[1] == criterion
    kind = "element" if criterion == "element" else "vector"
    torch.testing.assert_close(found[0][module], spread(rows(each, module, kind, settings["order"], row)))


@pytest.mark.parametrize("fusion", ["uncertainty", "mean"])
def test_the_fused_importance_is_exact_for_one_order_and_bounded_for_two(measured, fusion: str) -> None:
    together, each = measured
    for order, exact in (("first", True), ("second", False)):
        settings = saap.score(together, "saap", vector_order=order, element_order="first", fusion=fusion).settings
        found = fluctuation(together, settings)
        assert found is not None
        parts = {m: [rows(each, m, k, o, -1) for k, o in (("vector", order), ("element", "first"))] for m in found[0]}
        scales = [
            torch.cat([p[i].mean(0) for p in parts.values()]).mean() if fusion == "uncertainty" else 1 for i in (0, 1)
        ]
        for module, (vector, element) in parts.items():
            wanted = spread(vector / scales[0] + element / scales[1])
            if exact:
                torch.testing.assert_close(found[0][module], wanted)
            else:  # the covariance of different orders is not measured: an upper bound
                assert (found[0][module] >= wanted - 1e-12).all() and (found[0][module] < 2 * wanted).all()


def test_criteria_without_importance_per_sequence_get_the_element_wise_one(measured) -> None:
    together, each = measured
    for name, options in (("magnitude", {}), ("random", {}), ("vector", {"aggregation": "prod"})):
        found = fluctuation(together, saap.score(together, name, **options).settings)
        assert found is not None and found[1] == "element"
        torch.testing.assert_close(found[0]["mlp"], spread(rows(each, "mlp", "element", "first", -1)))
    single = fluctuation(together, saap.score(together, "saap", fusion="element").settings)
    assert single is not None
    torch.testing.assert_close(single[0]["mlp"], spread(rows(each, "mlp", "element", "first", -1)))


def test_one_sequence_has_no_spread_and_zero_importance_no_fluctuation(measured) -> None:
    together, each = measured
    assert fluctuation(each[0], {"criterion": "saap"}) is None
    silent = saap.Statistics.zeros(together.units)
    for module in silent.modules.values():
        module.salience.count = 2
    found = fluctuation(silent, {"criterion": "element", "order": "first", "aggregation": "sum"})
    assert found is not None and float(found[0]["mlp"].abs().max()) == 0
