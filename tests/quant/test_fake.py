"""Training through the rounding: what comes out is what was trained, and gradients are those of the relaxed network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.models import CifarResNet
from kdq.quant.fake import FakeQuantize, FakeQuantizeInput, fake_quantized, layout, quantized, roundings, with_layout
from kdq.utils.errors import KdqError


def network() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(8, num_classes=4, in_channels=1, width=0.25).eval()


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(trainable: nn.Module, steps: int = 3, lr: float = 0.05) -> nn.Module:
    """A few steps towards arbitrary logits."""
    target = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD([p for p in trainable.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (trainable.train()(images()) - target).square().mean().backward()
        optimizer.step()
    return trainable.eval()


@pytest.mark.parametrize("options", [{}, {"act_bits": 4}, {"per_channel": False}, {"float_dtype": "bf16"}])
@pytest.mark.parametrize("bits", [2, 3, 8, 16, 32])
def test_zero_steps_change_nothing(bits: int, options: dict[str, object], tmp_path: Path) -> None:
    start, _ = kdq.quantize(network(), [images()], bits=bits, **options)
    kdq.save(start, tmp_path / "start.kdq")
    logits = start(images())
    for given in (start, kdq.load(tmp_path / "start.kdq")):
        trainable = fake_quantized(given)
        end = quantized(trainable)
        assert torch.equal(trainable(images()), logits)
        assert torch.equal(end(images()), logits)
        if bits <= 16:  # finer codes are told apart by no float32
            for name, weight in start.quantized_weights.items():
                assert torch.equal(end.quantized_weights[name].codes, weight.codes)
        kdq.save(end, tmp_path / "end.kdq")
        assert torch.equal(kdq.load(tmp_path / "end.kdq")(images()), logits)


def test_a_module_that_holds_several_weights_is_rounded_and_stored(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x[..., :4], x[..., :6])[0].mean(1)

    torch.manual_seed(0)
    model, tokens = Attention().eval(), torch.randn(8, 5, 8)
    start, _ = kdq.quantize(model, [tokens], bits=3)
    assert len(start.quantized_weights) == 4
    end = quantized(fake_quantized(start))
    assert torch.equal(end(tokens), start(tokens))
    kdq.save(end, tmp_path / "end.kdq")
    assert torch.equal(kdq.load(tmp_path / "end.kdq", network=model)(tokens), start(tokens))


@pytest.mark.parametrize("act_bits", [None, 4])
def test_what_was_trained_is_what_is_saved(act_bits: int | None, tmp_path: Path) -> None:
    """With 2^b levels a channel, other codes and scales than before, and inputs rounded by learned scales."""
    start, _ = kdq.quantize(
        network(), [images()], bits={n: 2 + n.startswith("fc") for n in layers()}, act_bits=act_bits
    )
    trainable = trained(fake_quantized(start), lr=0.5)
    end = quantized(trainable)
    kdq.save(end, tmp_path / "end.kdq")
    assert torch.equal(end(images()), trainable(images()))
    assert torch.equal(kdq.load(tmp_path / "end.kdq")(images()), trainable(images()))
    moved = 0
    for name, before in start.quantized_weights.items():
        after = end.quantized_weights[name]
        rows = end.get_parameter(f"{name}.weight").flatten(1)
        assert after.levels == before.levels == (8 if name == "fc" else 4)
        assert max(len(row.unique()) for row in rows) <= after.levels
        assert not torch.equal(after.scale, before.scale)
        moved += int((after.codes != before.codes).sum())
    assert moved > 0
    before, after = start.quantized_activations, end.quantized_activations
    assert {n: (q.zero, q.bits) for n, q in before.items()} == {n: (q.zero, q.bits) for n, q in after.items()}
    assert all(before[name].scale != after[name].scale for name in before)


def layers() -> list[str]:
    return [name for name, module in network().named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def test_one_scale_of_a_layer_stays_one() -> None:
    start, _ = kdq.quantize(network(), [images()], bits=3, per_channel=False)
    end = quantized(trained(fake_quantized(start)))
    for name, weight in end.quantized_weights.items():
        assert len(weight.scale.unique()) == 1
        assert weight.scale.shape == start.quantized_weights[name].scale.shape
        assert weight.scale[0] != start.quantized_weights[name].scale[0]


def test_sixteen_bits_train_as_the_float_network_does() -> None:
    start, _ = kdq.quantize(network(), [images()], bits=16, solver="rtn")
    trainable = fake_quantized(start)
    for rounding in roundings(trainable):
        rounding.scale.requires_grad_(False).mul_(2)  # room for the largest weights to grow
    logits = trained(network())(images())
    torch.testing.assert_close(trained(trainable)(images()), logits, rtol=1e-3, atol=1e-3)
    assert (logits - network()(images())).abs().max() > 0.1


@pytest.mark.parametrize("scales", [5, 1])
def test_gradients_of_weights_are_those_of_the_relaxed_loss(scales: int) -> None:
    """Relaxed: the range stays, the rounding does not; for the scale, what the rounding added stays as it is."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    scale = torch.rand(scales, generator=generator, dtype=torch.float64) + 0.3
    zero, levels = torch.full((5,), 1.5, dtype=torch.float64), 4
    slopes = torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    rounding = FakeQuantize(scale, zero, levels)
    leaf = weight.clone().requires_grad_()
    (rounding(leaf) * slopes).sum().backward()

    place = weight.flatten(1) / scale[:, None] + zero[:, None]
    added, inside = place.round() - place, (place >= 0) & (place <= levels - 1)

    def of_weight(weight: Tensor) -> Tensor:
        place = (weight.flatten(1) / scale[:, None] + zero[:, None]).clamp(0, levels - 1)
        return ((place - zero[:, None]) * scale[:, None] * slopes.flatten(1)).sum()

    def of_scale(scale: Tensor) -> Tensor:
        moving = weight.flatten(1) / scale[:, None] + zero[:, None] + added
        fixed = torch.where(inside, moving, place.clamp(0, levels - 1))
        return ((fixed - zero[:, None]) * scale[:, None] * slopes.flatten(1)).sum()

    assert leaf.grad is not None
    assert rounding.scale.grad is not None
    torch.testing.assert_close(leaf.grad, differences(of_weight, weight))
    shared = weight.numel() / scales * (levels - 1)
    expected = differences(of_scale, scale) / shared**0.5
    torch.testing.assert_close(rounding.scale.grad, expected, rtol=1e-4, atol=1e-4)


def differences(loss: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-6) -> Tensor:
    """The central finite differences of ``loss``."""
    steps = h * torch.eye(at.numel(), dtype=at.dtype).view(-1, *at.shape)
    return torch.stack([(loss(at + step) - loss(at - step)) / (2 * h) for step in steps]).view_as(at)


def test_gradients_of_inputs_are_those_of_the_relaxed_loss() -> None:
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    slopes = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    rounding = FakeQuantizeInput(torch.tensor(0.3), zero=2, bits=2)
    leaf = values.clone().requires_grad_()
    (rounding.nearest(leaf) * slopes).sum().backward()
    place = values / 0.3
    inside = (place > -2) & (place < 1)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, slopes * inside)
    of_scale = torch.where(inside, place.round() - place, place.round().clamp(-2, 1))
    assert rounding.scale.grad is not None
    torch.testing.assert_close(rounding.scale.grad * (6 * 3) ** 0.5, (slopes * of_scale).sum())


def test_a_state_dict_finds_its_network_by_its_layout() -> None:
    start, _ = kdq.quantize(network(), [images()], bits=2, act_bits=8, keep_float=["fc"])
    trainable = trained(fake_quantized(start))
    again = with_layout(network(), layout(trainable)).eval()
    again.load_state_dict(trainable.state_dict())
    assert torch.equal(again(images()), trainable(images()))


def test_a_network_without_codes_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KdqError, match=r"give what kdq\.quantize"):
        fake_quantized(network())
    kdq.save(kdq.quantize(network(), [images()], bits=2)[0], tmp_path / "x.kdq")
    with pytest.raises(KdqError, match="decode='once'"):
        fake_quantized(kdq.load(tmp_path / "x.kdq", decode="layer"))
