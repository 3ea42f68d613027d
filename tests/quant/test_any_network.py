"""Networks of more than convolutions and linear layers: attention, tokens, tables, shared and compiled weights."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import kdq
from kdq import KdqError
from kdq.quant.bitsearch.bank import fill_bank
from kdq.quant.bitsearch.stitch import Stitched
from kdq.quant.fake import fake_quantized, layout, quantized, with_layout
from kdq.quant.layers import quantizable_layers
from tests.quant import literal

WIDTH, HEADS, TOKENS = 16, 4, 5


class Tokens(nn.Module):
    """A transformer of one block over the pixels of a 2x2 image and a class token."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.block = block
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.block(x)[:, 0])


class Block(nn.Module):
    """What ``nn.TransformerEncoderLayer`` computes, of linear layers that are called, images first."""

    def __init__(self, like: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        attention, self.norm1, self.norm2 = like.self_attn, like.norm1, like.norm2
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), attention.out_proj
        self.qkv.weight, self.qkv.bias = attention.in_proj_weight, attention.in_proj_bias
        self.linear1, self.linear2 = like.linear1, like.linear2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


def transformer(batch_first: bool = True) -> Tokens:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=batch_first, dropout=0)
    nn.init.normal_(block.self_attn.in_proj_bias)
    return Tokens(block).eval()


def pictures(count: int = 70) -> Tensor:
    """More than a chunk, the second of which is not full."""
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("correct", [None, "bias"])
@pytest.mark.parametrize("bits", [2, 4])
def test_attention_gets_the_codes_of_the_same_network_in_linear_layers(bits: int, correct: str | None) -> None:
    network = transformer()
    assert isinstance(network.block, nn.TransformerEncoderLayer)
    plain = copy.deepcopy(network)
    plain.block = Block(copy.deepcopy(network.block))
    with torch.no_grad():
        assert torch.allclose(network(pictures()), plain.eval()(pictures()), atol=1e-5)
    found, report = kdq.quantize(network, [pictures()], bits=bits, correct=correct)
    expected, _ = kdq.quantize(plain, [pictures()], bits=bits, correct=correct)
    names = ["patch", "block.self_attn.in_proj", "block.self_attn.out_proj", "block.linear1", "block.linear2", "head"]
    assert [layer.name for layer in report.layers] == names
    for weight, other in zip(found.quantized_weights.values(), expected.quantized_weights.values(), strict=True):
        assert (weight.codes == other.codes).float().mean() > 0.99  # sums in another order may tie
        assert torch.allclose(weight.scale, other.scale)
    assert torch.allclose(found.block.self_attn.in_proj_bias, expected.block.qkv.bias, atol=1e-2)
    with torch.no_grad():
        outputs, float_outputs = found(pictures()), network(pictures())
    error = float((outputs - float_outputs).norm() / float_outputs.norm())
    assert error == pytest.approx(report.layers[-1].error, rel=1e-3)


class TokensFirst(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.transpose(0, 1)).transpose(0, 1)


def test_tokens_may_come_before_the_images() -> None:
    network = transformer(batch_first=False)
    network.block = TokensFirst(network.block)
    found, report = kdq.quantize(network, [pictures()], bits=3)
    expected, other = kdq.quantize(transformer(), [pictures()], bits=3)
    assert [x.error for x in report.layers] == pytest.approx([x.error for x in other.layers], rel=1e-2)
    same = found.quantized_weights["head"].codes == expected.quantized_weights["head"].codes
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("decode", ["once", "layer"])
def test_attention_is_packed_and_loaded_bit_for_bit(tmp_path: Path, decode: str) -> None:
    network = transformer()
    made, report = kdq.quantize(network, [pictures()], bits=3)
    kdq.save(made, tmp_path / "network.kdq")
    loaded = kdq.load(tmp_path / "network.kdq", network=transformer(), decode=decode)
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), made(pictures()))
    kdq.save(loaded, tmp_path / "again.kdq")
    assert (tmp_path / "again.kdq").stat().st_size == (tmp_path / "network.kdq").stat().st_size
    left = {x.name: x.why for x in report.left}
    assert left == {"class_token": "no layer", "positions": "used by add"}
    floats = WIDTH * (1 + TOKENS)
    count = sum(weight.codes.numel() for weight in made.quantized_weights.values())
    assert report.avg_bits == pytest.approx((3 * count + 32 * floats) / (count + floats))


def test_a_bit_search_measures_attention_at_its_widths() -> None:
    """Kept outputs do not outlive a change of ``in_proj``, whose module has no forward pass of its own."""
    network, images = transformer(), pictures(32)
    bank = fill_bank(network, [images], [2, 8])
    batches = [(images, torch.zeros(32, dtype=torch.long))]
    stitched, wide = Stitched(network, bank.weights, batches), dict.fromkeys(bank.weights, 8)
    stitched(wide)
    for layer in bank.weights:
        assignment = wide | {layer: 2}
        assert stitched(assignment) == Stitched(network, bank.weights, batches)(assignment)
        assert stitched(assignment).loss > stitched(wide).loss


@pytest.mark.parametrize("keep", [[], ["block.self_attn", "patch"]])
def test_packed_weights_are_not_quantized_again_nor_dropped(tmp_path: Path, keep: list[str]) -> None:
    """Those of ``in_proj`` neither, whose module is no layer's."""
    kept = ["patch", "*.out_proj", "*.linear*", "head"]
    for options in ({}, {"keep_float": kept}):
        kdq.save(kdq.quantize(transformer(), [pictures(4)], bits=3, **options)[0], tmp_path / "network.kdq")
        loaded = kdq.load(tmp_path / "network.kdq", network=transformer(), decode="layer")
        with pytest.raises(KdqError, match=r"(patch|block.self_attn) decodes its weight as it runs: .* decode='once'"):
            kdq.quantize(loaded, [pictures(4)], keep_float=keep)


def test_attention_is_trained_through_its_rounding() -> None:
    network, _ = kdq.quantize(transformer(), [pictures()], bits=2)
    training = fake_quantized(network)
    again = with_layout(transformer(), layout(training))
    again.load_state_dict(training.state_dict())
    optimizer = torch.optim.SGD(again.parameters(), 1.0)
    again(pictures()).square().sum().backward()
    optimizer.step()
    made = quantized(again)
    with torch.no_grad():
        assert torch.allclose(training(pictures()), network(pictures()), atol=1e-5)
        assert torch.allclose(made(pictures()), again(pictures()), atol=1e-5)
    codes = [x.quantized_weights["block.self_attn.in_proj"].codes for x in (made, network)]
    assert not torch.equal(*codes)
    assert codes[0].max() < 4


class Tied(nn.Module):
    """Two layers of one weight and different biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


@pytest.mark.parametrize("decode", ["once", "layer"])
def test_a_shared_weight_is_solved_and_stored_once(tmp_path: Path, decode: str) -> None:
    torch.manual_seed(0)
    network, images = Tied().eval(), torch.randn(80, 12)
    made, report = kdq.quantize(network, [images], bits=3, float_dtype="bf16")
    assert [layer.name for layer in report.layers] == ["first", "head"]
    assert made.second.weight is made.first.weight
    kdq.save(made, tmp_path / "tied.kdq")
    loaded = kdq.load(tmp_path / "tied.kdq", network=Tied(), decode=decode)
    with torch.no_grad():
        assert torch.equal(loaded(images), made(images))
    kdq.save(loaded, tmp_path / "again.kdq")
    assert (tmp_path / "again.kdq").stat().st_size == (tmp_path / "tied.kdq").stat().st_size
    assert kdq.quantize(network, [images], keep_float=["second"])[1].left[0].name == "first.weight"


class Looped(nn.Module):
    """A weight that runs three times, once with another stride, in a network that writes into its images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loop, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def steps(self, x: Tensor) -> Iterator[Tensor]:
        """What enters the loop's layer, run by run, and the head."""
        x *= 2
        yield (x := self.stem(x).relu())
        yield (x := (self.loop(x) + x).relu())
        yield (x := self.loop(x).relu())
        yield F.conv2d(x, self.loop.weight, stride=2).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        *_, last = self.steps(x)
        return self.head(last)


def test_a_repeated_layer_is_solved_on_the_inputs_of_all_its_runs() -> None:
    torch.manual_seed(0)
    network, images = Looped().eval(), torch.randn(80, 3, 10, 10)
    before = images.clone()
    quantized, _ = kdq.quantize(network, [images], bits=2, solver="gpfq")
    assert torch.equal(images, before)
    with torch.no_grad():
        first, second, third, _ = network.steps(images.clone())
        xq = next(quantized.steps(images.clone()))
    loop = network.loop
    later = [literal.conv_patches(loop, second)[0], literal.conv_patches(nn.Conv2d(6, 6, 3, stride=2), third)[0]]
    X, Xq = (torch.cat([literal.conv_patches(loop, x)[0], *later]) for x in (first, xq))
    packed = quantized.quantized_weights["loop"]
    values = literal.alphabet_values(packed.scale[:, None], packed.zero[:, None], packed.levels)
    expected = literal.gpfq(loop.weight.flatten(1), X, Xq, values).float().view_as(loop.weight)
    assert torch.equal(quantized.loop.weight, expected)


class Cell(nn.Module):
    """A recurrent layer, an embedding, a layer that runs backwards, and one whose weight is changed as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True)
        self.up, self.standard = nn.ConvTranspose1d(8, 4, 2), nn.Conv1d(4, 4, 1)
        self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.own = nn.Parameter(torch.randn(4, 4))
        self.phases = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.lstm(self.table(x))[0].mT)
        x = F.conv1d(x, F.normalize(self.standard.weight, dim=1), self.standard.bias)
        return self.head(F.linear(x.mean(-1) @ self.phases.real, self.own))


def test_what_is_no_layer_stays_float_and_says_why() -> None:
    torch.manual_seed(0)
    network, words = Cell(), torch.arange(70 * 6).view(70, 6) % 9
    made, report = kdq.quantize(network, [words], bits=4)
    assert [(layer.name, layer.kind) for layer in report.layers] == [("own", "Linear"), ("head", "Linear")]
    assert {x.name: (x.kind, x.why) for x in report.left} == {
        "phases": ("Cell", "its numbers are torch.complex64"),
        "table.weight": ("Embedding", "used by embedding"),
        "lstm.weight_ih_l0": ("LSTM", "used by lstm"),
        "lstm.weight_hh_l0": ("LSTM", "used by lstm"),
        "up.weight": ("ConvTranspose1d", "used by conv_transpose1d"),
        "standard.weight": ("Conv1d", "never called"),
        "unused.weight": ("Linear", "never called"),
    }
    expected, _ = kdq.quantize(nn.Linear(4, 2), [torch.randn(9, 4)], bits=32)
    assert list(expected.quantized_weights) == ["weight"]
    with torch.no_grad():
        assert torch.isfinite(made(words)).all()


@pytest.mark.parametrize(
    ("keep", "float_layers"),
    [
        (["block"], ["block.linear1", "block.linear2", "block.self_attn.in_proj", "block.self_attn.out_proj"]),
        (["block.self_attn.in_proj_weight"], ["block.self_attn.in_proj"]),
        (["*_proj", "patch"], ["block.self_attn.in_proj", "block.self_attn.out_proj", "patch"]),
        (["class_token"], []),
        (["block.norm1"], []),
    ],
)
def test_keep_float_takes_modules_layers_parameters_and_patterns(keep: list[str], float_layers: list[str]) -> None:
    network = transformer()
    assert sorted(set(quantizable_layers(network)) - set(quantizable_layers(network, keep)) - {"class_token"}) == (
        float_layers
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [("block.linear3", "block.linear[12]"), ("clas_token", "class_token"), ("*.bloc", "block"), ("", "patch")],
)
def test_keep_float_refuses_what_names_nothing(name: str, near: str) -> None:
    with pytest.raises(KdqError, match=f"there is .*{near}"):
        kdq.quantize(transformer(), [pictures(4)], keep_float=[name])


def test_inputs_of_attention_cannot_be_rounded() -> None:
    with pytest.raises(KdqError, match=r"act_bits=8 .*block.self_attn.in_proj, block.self_attn.out_proj: name them"):
        kdq.quantize(transformer(), [pictures(4)], act_bits=8)
    kdq.quantize(transformer(), [pictures(4)], act_bits=8, keep_float=["*_proj"])


@pytest.mark.parametrize(
    ("network", "shape", "name"),
    [
        (lambda: Tied(), (70, 12), "first"),
        (lambda: Looped(), (70, 3, 10, 10), "loop"),
        (lambda: nn.Sequential(*[layer := nn.Linear(8, 8), nn.ReLU(), layer]), (70, 8), "0"),
    ],
    ids=["shared weight", "another stride", "shared module"],
)
def test_inputs_of_a_layer_that_runs_more_than_once_cannot_be_rounded(
    network: Callable[[], nn.Module], shape: tuple[int, ...], name: str
) -> None:
    with pytest.raises(KdqError, match=rf"act_bits=8 has one range a layer, and {name} run .*name them in keep_float"):
        kdq.quantize(network(), [torch.randn(shape)], act_bits=8)


def test_layers_beside_a_repeated_one_may_be_rounded() -> None:
    made, _ = kdq.quantize(Tied(), [torch.randn(70, 12)], act_bits=8, keep_float=["second"])
    assert list(made.quantized_activations) == ["head"]


def _pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("computed", [_pruned, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_computed_weight_may_stay_float(computed: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = nn.Sequential(computed(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3)), torch.randn(70, 8)
    with pytest.raises(KdqError, match=r"the weight of 0 is computed.*or name it in keep_float"):
        kdq.quantize(network, [images])
    network(images).sum().backward()  # as after training
    made, report = kdq.quantize(network, [images], bits=3, keep_float=["0"], float_dtype="bf16")
    assert [layer.name for layer in report.layers] == ["2"]
    kdq.save(made, tmp_path / "network.kdq")
    with torch.no_grad():
        expected = made(images)
        assert torch.equal(kdq.load(tmp_path / "network.kdq", network=network)(images), expected)
        assert torch.equal(quantized(fake_quantized(made))(images), expected)
        assert torch.allclose(made[0](images), network[0](images), rtol=0.1, atol=0.05)


class Calls(nn.Module):
    """Two layers, and between them what a function does."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("named", "plain"),
    [
        (lambda x: x + x.max(1, keepdim=True).values, lambda x: x + x.amax(1, keepdim=True)),
        (lambda x: x.topk(8).values, lambda x: x.sort(descending=True)[0]),
        (lambda x: x.gather(1, x.sort(1).indices), lambda x: x.sort(1)[0]),
        (lambda x: x - torch.aminmax(x, dim=1, keepdim=True).min, lambda x: x - x.amin(1, keepdim=True)),
        (
            lambda x: x + torch.stack(torch.aminmax(x, dim=1, keepdim=True)).sum(0),
            lambda x: x + torch.stack([x.amin(1, keepdim=True), x.amax(1, keepdim=True)]).sum(0),
        ),
    ],
    ids=["max", "topk", "sort", "aminmax", "stack"],
)
def test_results_of_torch_functions_have_their_names(
    named: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
) -> None:
    images, found = torch.randn(70, 6, generator=torch.Generator().manual_seed(1)), []
    for function in (named, plain):
        torch.manual_seed(0)
        found.append(kdq.quantize(Calls(function), [images], bits=3)[0])
    with torch.no_grad():
        assert torch.equal(found[0](images), found[1](images))


class Writes(nn.Module):
    """Two layers, and between them what a function does with the images ``(batch, 8)`` and the first one's output."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(8, 8), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(x, self.first(x)))


def _into_zeros(x: Tensor, y: Tensor) -> Tensor:
    made = torch.zeros(len(x), 8)
    made[:, :4] = y[:, :4]
    return made + x


def _into_a_view(x: Tensor, y: Tensor) -> Tensor:
    made = x.clone()
    part = made[:, :4]
    part += y[:, :4]
    return made


def _under_two_names(x: Tensor, y: Tensor) -> Tensor:
    made = x.clone()
    same = made.abs_()
    made += y
    return same


def _into_a_view_of_zeros(x: Tensor, y: Tensor) -> Tensor:
    made = torch.zeros(len(x), 8)
    made[:, :4].add_(y[:, :4])
    return made + x


def _into_zeros_that_were_read(x: Tensor, y: Tensor) -> Tensor:
    made = torch.zeros(len(x), 8)
    before = x + made
    made += y
    return before + made


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        (_into_zeros, lambda x, y: torch.cat([y[:, :4], 0 * y[:, :4]], 1) + x),
        (lambda x, y: torch.empty(len(x), 8).copy_(y) + x, lambda x, y: y + x),
        (lambda x, y: torch.add(x, y, out=torch.zeros(len(x), 8)) + x, lambda x, y: x + y + x),
        (lambda x, y: torch.add(x, y, out=torch.zeros_like(x)) + x, lambda x, y: x + y + x),
        (_into_a_view, lambda x, y: torch.cat([x[:, :4] + y[:, :4], x[:, 4:]], 1)),
        (_under_two_names, lambda x, y: x.abs() + y),
    ],
    ids=["zeros", "empty", "out", "out of images", "view", "two names"],
)
def test_what_is_written_in_place_is_every_networks_own(
    written: Callable[[Tensor, Tensor], Tensor], plain: Callable[[Tensor, Tensor], Tensor]
) -> None:
    images, found = torch.randn(70, 8, generator=torch.Generator().manual_seed(1)), []
    for function in (written, plain):
        torch.manual_seed(0)
        found.append(kdq.quantize(Writes(function), [images], bits=3))
    with torch.no_grad():
        assert torch.equal(found[0].network(images), found[1].network(images))
    assert [layer.error for layer in found[0].report.layers] == [layer.error for layer in found[1].report.layers]


@pytest.mark.parametrize("function", [_into_a_view_of_zeros, _into_zeros_that_were_read])
def test_zeros_that_cannot_be_followed_are_refused(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(KdqError, match=r"writes images into a tensor that .*use x.new_zeros"):
        kdq.quantize(Writes(function), [torch.randn(70, 8)], bits=3)


def _inside(network: nn.Module) -> nn.Module:
    network[0] = torch.compile(network[0], backend="eager")  # type: ignore[index, assignment]
    return network


def _in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize(
    "wrap",
    [lambda network: torch.compile(network, backend="eager"), nn.DataParallel, _inside, _in_place],
    ids=["compiled", "data parallel", "compiled inside", "compiled in place"],
)
def test_wrapped_networks_are_quantized_as_what_they_wrap(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)).eval()

    wrapped = wrap(network())
    wrapped(pictures(4))
    made, _ = kdq.quantize(wrapped, [pictures()], bits=3)
    expected, _ = kdq.quantize(network(), [pictures()], bits=3)
    with torch.no_grad():
        assert torch.equal(made(pictures()), expected(pictures()))
    kdq.save(torch.compile(made), tmp_path / "network.kdq")
    loaded = kdq.load(tmp_path / "network.kdq", network=wrapped)
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), expected(pictures()))


def test_torchscript_is_refused() -> None:
    with pytest.raises(KdqError, match="quantize what it was made of"):
        kdq.quantize(torch.jit.trace(nn.Linear(4, 2), torch.zeros(1, 4)), [torch.zeros(1, 4)])


def test_a_weight_with_the_name_of_another_layer_stays_float_and_is_listed() -> None:
    """As ``first_weight`` beside ``first.weight``."""

    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.first_weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.first(x), self.first_weight)

    torch.manual_seed(0)
    network = Alike()
    found, report = kdq.quantize(network, [torch.randn(32, 8)])
    assert [layer.name for layer in report.layers] == ["first"]
    assert [(x.name, "the layer first" in x.why) for x in report.left] == [("first_weight", True)]
    assert torch.equal(found.first_weight, network.first_weight)
    assert not torch.equal(found.first.weight, network.first.weight)
