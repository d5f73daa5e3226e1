"""vLLM's Linears of quant_method "saap" without vLLM: what is loaded, how it is shared out, what comes of it.

A few modules stand in for vLLM (conftest.py); ``make test-vllm`` runs the real ones.
"""

import types

import pytest
import torch
from safetensors.torch import load_file

from saap.serving.stored_shard import Placement, group_of_share, shard_rows
from saap.stored_weight import NAMES, stored_shapes, to_stored
from saap_kernels import pack, unpack
from tests.serving.checkpoints import quantised_checkpoint, tiny_checkpoint
from tests.serving.test_vllm_plugin import quantisation
from tests.serving.vllm_stand import LinearBase


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def load_all(layer, packed: dict, kinds=NAMES) -> None:
    for shard, each in packed.items():
        stored = to_stored(each)
        for kind in kinds:
            parameter = getattr(layer, kind)
            arguments = (parameter, stored[kind]) if shard is None else (parameter, stored[kind], shard)
            parameter.weight_loader(*arguments)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("fused_on_disk", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 64)])
def test_fused_rows_are_loaded_and_run(vllm, bits, group, fused_on_disk, devices) -> None:
    rows, columns = [64, 32, 32], 97  # an odd count: the last byte of int4 holds one column, the last group is shorter
    packed = {i: pack(weight(size, columns, i), bits=bits, group_size=group) for i, size in enumerate(rows)}
    wanted, x = [unpack(each) for each in packed.values()], weight(5, columns, 9)
    if fused_on_disk:
        packed = {
            None: pack(torch.cat([weight(n, columns, i) for i, n in enumerate(rows)]), bits=bits, group_size=group)
        }
    config = quantisation(vllm, bits, group)
    for rank in range(devices):
        layer = LinearBase("model.layers.0.qkv_proj", config, columns, rows, rank=rank, devices=devices)
        load_all(layer, packed)
        layer.quant_method.process_weights_after_loading(layer)
        share = torch.cat([each.chunk(devices)[rank] for each in wanted])
        bias = weight(1, len(share), 3)[0]
        # both are fp32 sums of 97 products, in other orders
        torch.testing.assert_close(layer.quant_method.apply(layer, x, bias), x @ share.T + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("group", "own"), [(32, 32), (128, 32)])
def test_columns_are_shared_out_in_groups_that_fit(vllm, bits, group, own) -> None:
    rows, columns, devices = [48], 192, 2  # 96 columns each: a group of 128 lies across both
    packed = pack(weight(rows[0], columns), bits=bits, group_size=group)
    config, x = quantisation(vllm, bits, group), weight(5, columns, 9)
    total = torch.zeros(5, rows[0])
    for rank in range(devices):
        layer = LinearBase("model.layers.0.mlp.down_proj", config, columns, rows, "row", rank, devices)
        load_all(layer, {None: packed})
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.saap_group == own
        total += layer.quant_method.apply(layer, x.chunk(devices, 1)[rank].contiguous())
    # fp32 sums of 192 products, in other orders
    torch.testing.assert_close(total, x @ unpack(packed).T, rtol=1e-5, atol=1e-4)


def test_shares_that_cut_every_group_are_refused(vllm) -> None:
    config = quantisation(vllm, 4, 64)
    with pytest.raises(ValueError, match=r"model.layers.3.mlp.down_proj: 2 devices would take 40 of 80 columns each"):
        LinearBase("model.layers.3.mlp.down_proj", config, 80, [48], "row", 0, 2)
    assert group_of_share("down", 80, 80, 64) == 64  # one device takes any count
    assert group_of_share("down", 192, 96, 64) == 32 and group_of_share("down", 256, 128, 64) == 64


def test_stored_tensors_go_when_the_weight_is_laid_out(vllm) -> None:
    layer = LinearBase("model.layers.0.o_proj", quantisation(vllm, 4, 32), 96, [64])
    load_all(layer, {0: pack(weight(64, 96), bits=4, group_size=32)})
    stored = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    layer.quant_method.process_weights_after_loading(layer)
    after = dict(layer.named_parameters())
    assert after.keys() == set(NAMES) and not {p.data_ptr() for p in after.values()} & set(stored.values())
    assert after["qweight"].shape == (64, 64)  # 128 columns, two a byte: the kernels' pitch
    values = after["qweight"].clone()
    layer.quant_method.process_weights_after_loading(layer)  # a second time: nothing to do
    assert torch.equal(layer.qweight, values)


def test_missing_tensors_are_refused_unless_weights_are_to_be_dummies(vllm) -> None:
    packed = {0: pack(weight(64, 96), bits=4, group_size=32)}
    layer = LinearBase("model.layers.0.o_proj", quantisation(vllm, 4, 32), 96, [64])
    load_all(layer, packed, ("qweight", "qscale"))
    with pytest.raises(ValueError, match="model.layers.0.o_proj: expected 64 rows of qzero in the checkpoint, got 0"):
        layer.quant_method.process_weights_after_loading(layer)
    vllm.load_format = "dummy"
    layer = LinearBase("model.layers.0.o_proj", quantisation(vllm, 4, 32), 96, [64])
    layer.quant_method.process_weights_after_loading(layer)
    assert not layer.quant_method.apply(layer, weight(2, 96)).any()


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [
        (8, 32, r"q_proj \(part q\): expected qweight \(64, 49\) of torch.uint8 for 4 bits .* got \(64, 97\)"),
        (4, 64, r"q_proj \(part q\): expected qscale \(64, 4\) of floating-point numbers .* got \(64, 2\)"),
    ],
)
def test_tensors_of_another_format_are_refused_by_name(bits, group, message) -> None:
    placement = Placement("q_proj", {"q": 64, None: 64}, 97, 4, 32, 32)
    stored = to_stored(pack(weight(64, 97), bits=bits, group_size=group))
    with pytest.raises(ValueError, match=message):
        for kind in NAMES:
            placement.take(kind, stored[kind], "q")


def test_rows_of_shards_go_by_the_checkpoint_not_by_copies(vllm) -> None:
    """One KV head on two devices: each has a copy, the checkpoint one."""
    qkv = types.SimpleNamespace(
        total_num_heads=4, total_num_kv_heads=1, head_size=8, v_head_size=16, output_sizes=[32, 16, 32]
    )
    assert shard_rows(qkv) == {"q": 32, "k": 8, "v": 16, None: 56}
    assert shard_rows(types.SimpleNamespace(output_size=24)) == {0: 24, None: 24}
    placement = Placement("gate_up", {0: 8, 1: 8, None: 16}, 4, 8, 32, 32)
    both = to_stored(pack(weight(16, 4), bits=8, group_size=32))
    for kind in NAMES:
        placement.take(kind, both[kind], (0, 1))
    placement.check_complete()


def test_the_helpers_checkpoint_is_the_stored_form(tmp_path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "qwen2")
    stored, plain = (load_file(f / "model.safetensors") for f in quantised_checkpoint(source, tmp_path / "q", 4, 32))
    name = "model.layers.1.mlp.down_proj"
    for kind, shape in stored_shapes((64, 33), 4, 32).items():
        assert tuple(stored[f"{name}.{kind}"].shape) == shape
    original = load_file(source / "model.safetensors")
    # half a step of sixteen of a group's range, which is at most 8 standard deviations of 0.15
    assert 0 < (plain[f"{name}.weight"] - original[f"{name}.weight"]).abs().max() <= 8 * 0.15 / 15 / 2
    assert f"{name}.weight" not in stored and torch.equal(stored["model.norm.weight"], original["model.norm.weight"])
