import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kdq
from kdq import KdqError
from kdq.models import build
from kdq.quant.packing import pack_bits, packed_bytes, unpack_bits


@pytest.mark.parametrize("bits", range(1, 33))
def test_every_width_round_trips(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 1000):
        codes = torch.randint(0, 2**bits, (count,))
        codes[:2] = torch.tensor([2**bits - 1, 0])[:count]
        packed = pack_bits(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.numel() == packed_bytes(count, bits)
        assert packed.numel() - count * bits / 8 < 4  # less than a byte lost per plane of eight bits
        assert torch.equal(unpack_bits(packed, count, bits), codes)


@given(st.integers(1, 32).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=40))))
def test_any_codes_round_trip(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    assert unpack_bits(pack_bits(torch.tensor(codes, dtype=torch.int64), bits), len(codes), bits).tolist() == codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16, 20, 26, 32])
def test_a_file_gives_bit_identical_logits(tmp_path: Path, bits: int) -> None:
    net = build({"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 10, "width": 0.5})
    images = torch.randn(20, 3, 8, 8)
    quantized, report = kdq.quantize(net, [images], bits=bits)
    size = kdq.save(quantized, tmp_path / "net.kdq")
    loaded = kdq.load(tmp_path / "net.kdq")
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))
    others = sum(value.nbytes for name, value in net.state_dict().items() if not _quantized(name, net))
    header = size - others - report.weight_bits_total / 8
    assert 0 < header < 8000
    assert size == (tmp_path / "net.kdq").stat().st_size


def _quantized(name: str, net: nn.Module) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and isinstance(net.get_submodule(module), (nn.Conv2d, nn.Linear))


def test_a_network_of_ones_own_needs_an_instance(tmp_path: Path, relu_net: nn.Module) -> None:
    images = torch.randn(8, 3, 9, 9)
    quantized, _ = kdq.quantize(relu_net, [images], bits=3, exclude=["mix"])
    kdq.save(quantized, tmp_path / "net.kdq")
    with pytest.raises(KdqError, match="architecture"):
        kdq.load(tmp_path / "net.kdq")
    loaded = kdq.load(tmp_path / "net.kdq", network=type(relu_net)())
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))
    with pytest.raises(KdqError, match="does not fit"):
        kdq.load(tmp_path / "net.kdq", network=nn.Linear(3, 3))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    net = build({"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 4, "width": 0.25})
    quantized, _ = kdq.quantize(net, [torch.randn(4, 3, 8, 8)], bits=2)
    path = tmp_path / "net.kdq"
    kdq.save(quantized, path)
    good = path.read_bytes()
    with pytest.raises(KdqError, match="no file"):
        kdq.load(tmp_path / "other.kdq")
    start = 8 + int.from_bytes(good[:8], "little")
    for position in (start, (start + len(good)) // 2, len(good) - 1):
        damaged = bytearray(good)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(KdqError, match="damaged"):
            kdq.load(path)
    for cut in (0, 5, start - 1, start, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(KdqError):
            kdq.load(path)


def test_files_of_a_later_format_and_foreign_architectures_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "net.kdq"
    save_file({}, path, {"kdq": json.dumps({"format": 99})})
    with pytest.raises(KdqError, match="format 99"):
        kdq.load(path)
    quantized, _ = kdq.quantize(nn.Sequential(nn.Linear(3, 3)), [torch.randn(4, 3)], bits=2)
    quantized.kdq_net = {"_target_": "os.system", "command": "true"}
    kdq.save(quantized, path)
    with pytest.raises(KdqError, match="architecture"):
        kdq.load(path)


@pytest.mark.parametrize("alphabet", ["uniform", "symmetric", "asymmetric", "ternary", "paper"])
@pytest.mark.parametrize("act_bits", [None, 4])
def test_every_alphabet_and_activation_quantizer_loads_back(
    tmp_path: Path, relu_net: nn.Module, alphabet: str, act_bits: int | None
) -> None:
    images = torch.randn(8, 3, 9, 9)
    quantized, _ = kdq.quantize(relu_net, [images], bits=3, alphabet=alphabet, act_bits=act_bits)
    kdq.save(quantized, tmp_path / "net.kdq")
    loaded = kdq.load(tmp_path / "net.kdq", network=type(relu_net)())
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))
    assert loaded.quantized_activations == quantized.quantized_activations
    assert kdq.save(loaded, tmp_path / "again.kdq") == (tmp_path / "net.kdq").stat().st_size
