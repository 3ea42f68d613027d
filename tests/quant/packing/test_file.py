import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import kdq
from kdq import KdqError
from kdq.models.build import build
from kdq.quant.activations import ActivationQuantizer
from kdq.quant.packing.bits import pack_bits, packed_bytes, unpack_bits
from kdq.quant.packing.file import DECODE, checksum
from kdq.quant.solvers.alphabet import Alphabet


@pytest.mark.parametrize("bits", range(1, 34))
def test_every_width_round_trips(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 1000):
        codes = torch.randint(0, 2**bits, (count,))
        codes[:2] = torch.tensor([2**bits - 1, 0])[:count]
        packed = pack_bits(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.numel() == packed_bytes(count, bits)
        assert packed.numel() - count * bits / 8 < 4  # less than a byte lost per plane of eight bits
        unpacked = unpack_bits(packed, count, bits)
        assert unpacked.dtype == (torch.uint8 if bits <= 8 else torch.int64)
        assert torch.equal(unpacked.long(), codes)


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
    quantized, _ = kdq.quantize(relu_net, [images], bits=3, keep_float=["mix"])
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


def test_zeros_far_from_the_middle_load_back(tmp_path: Path) -> None:
    """Half steps from the middle are stored in a byte, which 128 do not fit."""

    def skewed(weight: Tensor, bits: int) -> Alphabet:
        zero = torch.full_like(weight[..., :1], 128.0)
        zero[..., 0, :] = 192.0
        return Alphabet(torch.full_like(zero, 0.01), zero, 257)

    net = nn.Sequential(nn.Linear(4, 3))
    quantized, _ = kdq.quantize(net, [images := torch.randn(8, 4)], bits=8, alphabet=skewed)
    kdq.save(quantized, tmp_path / "net.kdq")
    assert torch.equal(kdq.load(tmp_path / "net.kdq", network=net)(images), quantized(images))


@pytest.mark.parametrize("decode", DECODE)
@pytest.mark.parametrize(
    "scale", [torch.ones(0), torch.ones(1), torch.ones(2, 3), torch.ones(3, 1), torch.ones(3).long()]
)
def test_a_scale_is_one_number_a_channel(tmp_path: Path, scale: Tensor, decode: str) -> None:
    quantized, _ = kdq.quantize(nn.Sequential(nn.Linear(4, 3)), [torch.randn(8, 4)], bits=3)
    kdq.save(quantized, tmp_path / "net.kdq")
    with safe_open(tmp_path / "net.kdq", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["0.scale"] = scale
    save_file(tensors, tmp_path / "net.kdq", metadata | {"sha256": checksum(metadata["kdq"], tensors)})
    with pytest.raises(KdqError, match="layer 0 does not hold a scale and a zero for each of its 3 channels"):
        kdq.load(tmp_path / "net.kdq", network=nn.Sequential(nn.Linear(4, 3)), decode=decode)


def test_an_activation_whose_zero_is_no_code_is_refused(tmp_path: Path, relu_net: nn.Module) -> None:
    quantized, _ = kdq.quantize(relu_net, [torch.randn(8, 3, 9, 9)], bits=3, act_bits=4)
    name = next(iter(quantized.quantized_activations))
    for zero in (-1, 16):
        quantized.quantized_activations[name] = ActivationQuantizer(0.1, zero, 4)
        kdq.save(quantized, tmp_path / "net.kdq")
        with pytest.raises(KdqError, match=f"zero {zero} makes no sense"):
            kdq.load(tmp_path / "net.kdq", network=type(relu_net)())


def test_a_file_of_the_first_format_still_loads() -> None:
    """``format1.kdq`` was written by the first version of kdq, which printed these logits."""
    path = Path(__file__).parent / "format1.kdq"
    loaded = kdq.load(path)
    assert {weight.levels for weight in loaded.quantized_weights.values()} == {3, 4, 8, 16, 17, 128, 256, 4096}
    with torch.no_grad():
        logits = loaded(torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8))
    expected = [
        [-0.008137844502925873, 0.007831007242202759, -0.9474871158599854],
        [0.09434804320335388, 0.15706582367420197, -0.21070772409439087],
    ]
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def reader() -> Any:
    """The reader printed in FORMAT.md."""
    text = (Path(kdq.__file__).parent / "quant" / "packing" / "FORMAT.md").read_text()
    code = text.split("<!-- reader -->\n```python\n")[1].split("```")[0]
    assert "kdq." not in code
    assert len(code.splitlines()) < 35
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read"]


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 12, 26])
@pytest.mark.parametrize("alphabet", ["uniform", "asymmetric", "paper"])
def test_the_documented_reader_finds_the_same_weights(
    tmp_path: Path, relu_net: nn.Module, reader: Any, bits: int, alphabet: str
) -> None:
    quantized, _ = kdq.quantize(relu_net, [torch.randn(8, 3, 9, 9)], bits=bits, alphabet=alphabet, float_dtype="bf16")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "size": [9, 9]}
    kdq.save(quantized, tmp_path / "net.kdq", preprocess, ["a", "b", "c", "d", "e"])
    header, weights = reader(tmp_path / "net.kdq")
    assert header["preprocess"] == preprocess
    assert header["classes"] == ["a", "b", "c", "d", "e"]
    assert set(weights) == set(quantized.quantized_weights)
    for name, weight in weights.items():
        assert torch.equal(torch.from_numpy(weight), quantized.get_submodule(name).weight.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8, 16, 26])
def test_a_cast_network_has_the_same_weights_however_they_are_decoded(
    tmp_path: Path, relu_net: nn.Module, bits: int, dtype: torch.dtype
) -> None:
    quantized, _ = kdq.quantize(relu_net, [torch.randn(8, 3, 9, 9)], bits=bits, solver="rtn")
    kdq.save(quantized, tmp_path / "net.kdq")
    once, layer = (kdq.load(tmp_path / "net.kdq", network=relu_net, decode=d).to(dtype) for d in ("once", "layer"))
    for name in quantized.quantized_weights:
        assert torch.equal(once.get_submodule(name).weight, layer.get_submodule(name).weight)


@pytest.mark.parametrize("bits", [4, 26])
def test_the_documented_reader_keeps_doubles(tmp_path: Path, relu_net: nn.Module, reader: Any, bits: int) -> None:
    quantized, _ = kdq.quantize(relu_net.double(), [torch.randn(8, 3, 9, 9).double()], bits=bits, solver="rtn")
    kdq.save(quantized, tmp_path / "net.kdq")
    for name, weight in reader(tmp_path / "net.kdq")[1].items():
        assert torch.equal(torch.from_numpy(weight), quantized.get_submodule(name).weight.detach())


def test_the_documented_reader_reads_the_first_format(reader: Any) -> None:
    path = Path(__file__).parent / "format1.kdq"
    loaded = kdq.load(path)
    for name, weight in reader(path)[1].items():
        assert torch.equal(torch.from_numpy(weight), loaded.get_submodule(name).weight.detach())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounded_floats_are_evaluated_and_stored_as_they_are(tmp_path: Path, relu_net: nn.Module, dtype: str) -> None:
    images = torch.randn(8, 3, 9, 9)
    wide, wide_report = kdq.quantize(relu_net, [images], bits=3, keep_float=["mix"])
    rounded, report = kdq.quantize(relu_net, [images], bits=3, keep_float=["mix"], float_dtype=dtype)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    saved = 0
    for name, value in relu_net.state_dict().items():
        if value.is_floating_point() and name.removesuffix(".weight") not in rounded.quantized_weights:
            assert torch.equal(rounded.state_dict()[name], value.to(half).float())
            saved += 2 * value.numel()
    full, size = kdq.save(wide, tmp_path / "wide.kdq"), kdq.save(rounded, tmp_path / "net.kdq")
    assert abs(full - size - saved) < 64  # the header's numbers differ in length
    assert report.weight_bits_total == wide_report.weight_bits_total - 16 * relu_net.mix.weight.numel()
    loaded = kdq.load(tmp_path / "net.kdq", network=relu_net)
    with torch.no_grad():
        assert torch.equal(loaded(images), rounded(images))
        assert not torch.equal(loaded(images), wide(images))
        assert kdq.save(loaded, tmp_path / "again.kdq") == size
        loaded.norm.bias.add_(0.001)
    with pytest.raises(KdqError, match=r"norm\.bias was changed"):
        kdq.save(loaded, tmp_path / "again.kdq")


def test_wrong_float_dtypes_are_refused(relu_net: nn.Module) -> None:
    images = torch.randn(8, 3, 9, 9)
    with pytest.raises(KdqError, match="bf16, fp16"):
        kdq.quantize(relu_net, [images], float_dtype="fp8")
    relu_net.norm.running_var.fill_(1e6)
    with pytest.raises(KdqError, match=r"norm\.running_var .* too large"):
        kdq.quantize(relu_net, [images], float_dtype="fp16")


@pytest.mark.parametrize("bits", [2, 3, 8, 26])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_layers_that_decode_when_they_run_give_the_same_logits(tmp_path: Path, bits: int, act_bits: int | None) -> None:
    net = build({"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 10, "width": 2.0})
    images = torch.randn(20, 3, 8, 8)
    quantized, _ = kdq.quantize(net, [images], bits=bits, act_bits=act_bits)
    size = kdq.save(quantized, tmp_path / "net.kdq")
    once, layer = (kdq.load(tmp_path / "net.kdq", decode=decode) for decode in ("once", "layer"))
    with torch.no_grad():
        assert torch.equal(once(images), quantized(images))
        assert torch.equal(layer(images), quantized(images))
    held = sum(value.nbytes for value in layer.state_dict().values())
    assert held < size < held + 8000  # all but the header
    assert kdq.save(layer, tmp_path / "again.kdq") == size
    assert kdq.load(tmp_path / "again.kdq").state_dict().keys() == net.state_dict().keys()


def test_decode_is_once_or_layer(tmp_path: Path) -> None:
    with pytest.raises(KdqError, match="once, layer"):
        kdq.load(tmp_path / "net.kdq", decode="never")


@pytest.mark.parametrize(
    ("bits", "options"), [(32, {"alphabet": "paper"}), (26, {"alphabet": "asymmetric", "per_channel": False})]
)
def test_more_levels_than_float32_counts_load_back(tmp_path: Path, bits: int, options: dict[str, Any]) -> None:
    net = build({"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 10, "width": 0.25})
    images = torch.randn(20, 3, 8, 8)
    quantized, _ = kdq.quantize(net, [images], bits=bits, **options)
    kdq.save(quantized, tmp_path / "net.kdq")
    with torch.no_grad():
        assert torch.equal(kdq.load(tmp_path / "net.kdq")(images), quantized(images))


def test_changed_weights_are_not_saved_as_what_they_were(tmp_path: Path, relu_net: nn.Module) -> None:
    quantized, _ = kdq.quantize(relu_net, [torch.randn(8, 3, 8, 8)], bits=4)
    name = next(iter(quantized.quantized_weights))
    quantized.get_submodule(name).weight.data += 1
    with pytest.raises(KdqError, match=f"the weight of {name} was changed since it was quantized"):
        kdq.save(quantized, tmp_path / "net.kdq")


def test_a_network_is_not_saved_as_a_folder(tmp_path: Path, relu_net: nn.Module) -> None:
    with pytest.raises(KdqError, match="is a folder: give the file's name"):
        kdq.save(relu_net, tmp_path)


def test_names_that_begin_like_a_weights_are_kept(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    net[1].register_buffer("weight_scale", torch.tensor(3.0))
    quantized, _ = kdq.quantize(net, [torch.randn(8, 3, 2, 2)], bits=4)
    kdq.save(quantized, tmp_path / "net.kdq")
    assert kdq.load(tmp_path / "net.kdq", network=net).state_dict()["1.weight_scale"] == 3


def test_a_given_network_lends_its_shape_and_not_its_rounding(tmp_path: Path, relu_net: nn.Module) -> None:
    images = torch.randn(8, 3, 8, 8)
    rounding, _ = kdq.quantize(relu_net, [images], bits=8, act_bits=2)
    saved, _ = kdq.quantize(relu_net, [images], bits=8)
    kdq.save(saved, tmp_path / "net.kdq")
    with torch.no_grad():
        before = rounding(images)
        assert torch.equal(kdq.load(tmp_path / "net.kdq", network=rounding)(images), saved(images))
        assert torch.equal(rounding(images), before)
        kdq.save(rounding, tmp_path / "rounding.kdq")
        assert torch.equal(kdq.load(tmp_path / "rounding.kdq", network=rounding)(images), before)


def test_a_given_network_has_weights_to_fill(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    kdq.save(kdq.quantize(net, [torch.randn(9, 8)], bits=4)[0], tmp_path / "net.kdq")
    packed = kdq.load(tmp_path / "net.kdq", network=net, decode="layer")
    for computing in (packed, nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))):
        with pytest.raises(KdqError, match=r"its weight of 0 as it runs, by decode=.layer.*: pass it as it was built"):
            kdq.load(tmp_path / "net.kdq", network=computing)


class Extra(nn.Linear):
    """A layer with more in its state dict than tensors."""

    def __init__(self, state: Any) -> None:
        super().__init__(8, 4)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    images = torch.randn(9, 8)
    made, _ = kdq.quantize(nn.Sequential(Extra({"count": 3})), [images], bits=4)
    with pytest.raises(KdqError, match=r"^0\._extra_state is no tensor.*: let get_extra_state return one$"):
        kdq.save(made, tmp_path / "net.kdq")
    made, _ = kdq.quantize(nn.Sequential(Extra(torch.tensor(3))), [images], bits=4)
    kdq.save(made, tmp_path / "net.kdq")
    assert kdq.load(tmp_path / "net.kdq", network=nn.Sequential(Extra(torch.tensor(0))))[0].state == 3


@pytest.mark.parametrize("float_dtype", [None, "bf16", "fp16"])
def test_a_buffer_in_16_bits_is_not_a_network_rounded_to_them(tmp_path: Path, float_dtype: str | None) -> None:
    net, images = nn.Sequential(nn.Linear(8, 4)), torch.randn(9, 8)
    net.register_buffer("mean", torch.tensor(0.1, dtype=torch.float16))
    made, _ = kdq.quantize(net, [images], bits=4, float_dtype=float_dtype)
    size = kdq.save(made, tmp_path / "net.kdq")
    loaded = kdq.load(tmp_path / "net.kdq", network=net)
    assert loaded.kdq_float_dtype == float_dtype
    assert kdq.save(loaded, tmp_path / "again.kdq") == size


@pytest.mark.parametrize("decode", DECODE)
def test_a_network_of_another_dtype_comes_back_able_to_run(tmp_path: Path, decode: str) -> None:
    net = {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 10, "width": 0.5}
    images = torch.randn(20, 3, 8, 8)
    quantized, _ = kdq.quantize(build(net), [images], bits=4)
    double, _ = kdq.quantize(build(net).double(), [images.double()], bits=4)
    with torch.no_grad():
        kdq.save(double, tmp_path / "double.kdq")
        assert torch.equal(kdq.load(tmp_path / "double.kdq", decode=decode)(images.double()), double(images.double()))
        kdq.save(quantized, tmp_path / "net.kdq")
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
            loaded = kdq.load(tmp_path / "net.kdq", network=build(net).to(dtype), decode=decode)
            logits = loaded(images.to(dtype))
            assert logits.dtype == dtype
            assert (logits.float() - quantized(images)).norm() < tolerance * quantized(images).norm()
