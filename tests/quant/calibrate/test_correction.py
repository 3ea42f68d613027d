"""Bias correction and BatchNorm re-estimation: channels get back the means and variances of the float network."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq import KdqError
from kdq.models import CifarResNet
from kdq.quant.config import QuantConfig
from kdq.quant.network import quantize_widths


def outputs_of(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """What the named module of ``network`` gives for ``images``, one row per channel."""
    found: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(output.clone()))
    with torch.no_grad():
        network(images)
    handle.remove()
    (output,) = found
    axis = -1 if isinstance(network.get_submodule(name), nn.Linear) else 1
    return output.movedim(axis, 0).flatten(1).double()


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("correct", ["bias", "batchnorm"])
def test_layers_with_a_bias_keep_their_means(relu_net: nn.Module, correct: str) -> None:
    images = torch.randn(150, 3, 9, 9)  # three chunks, the last one not full
    for name in ("grouped", "depthwise", "mix", "head"):
        expected = outputs_of(relu_net, name, images).mean(1)
        plain, _ = kdq.quantize(relu_net, [images], bits=2, solver="gpfq")
        assert error(outputs_of(plain, name, images).mean(1), expected) > 0.01
        corrected, _ = kdq.quantize(relu_net, [images], bits=2, solver="gpfq", correct=correct)
        assert error(outputs_of(corrected, name, images).mean(1), expected) < 1e-5


class Shared(nn.Module):
    """Two layers that share their weight, or their bias."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        setattr(self.second, attribute, getattr(self.first, attribute))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_each_bias_is_corrected_where_it_first_runs(attribute: str) -> None:
    torch.manual_seed(0)
    network, images = Shared(attribute), torch.randn(150, 8)
    names = ["first", "second", "head"] if attribute == "weight" else ["first", "head"]
    plain, _ = kdq.quantize(network, [images], bits=2, solver="gpfq")
    corrected, report = kdq.quantize(network, [images], bits=2, solver="gpfq", correct="bias")
    for name in names:
        expected = outputs_of(network, name, images).mean(1)
        assert error(outputs_of(plain, name, images).mean(1), expected) > 0.01
        assert error(outputs_of(corrected, name, images).mean(1), expected) < 1e-5
    outputs, exact = (outputs_of(net, "head", images) for net in (corrected, network))
    assert float((outputs - exact).norm() / exact.norm()) == pytest.approx(report.layers[-1].error, rel=1e-3)


def test_batchnorms_keep_their_means_and_variances() -> None:
    torch.manual_seed(0)
    network, images = CifarResNet(20, num_classes=10, width=0.25).eval(), torch.randn(100, 3, 16, 16)
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name in norms:
        nn.init.uniform_(network.get_submodule(name).running_mean, -0.2, 0.2)
        network.get_submodule(name).eps = 0.1
    assert len(norms) > 15
    plain, corrected = (kdq.quantize(network, [images], bits=2, correct=c)[0] for c in (None, "batchnorm"))
    for name in norms:
        expected = outputs_of(network, name, images)
        found, before = (outputs_of(version, name, images) for version in (corrected, plain))
        assert error(found.mean(1), expected.mean(1)) < 1e-4, name
        assert error(found.var(1), expected.var(1)) < 1e-4, name
        assert error(before.var(1), expected.var(1)) > 1e-3, name


def test_a_channel_that_never_changes_keeps_its_value() -> None:
    network = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 1, bias=False), nn.BatchNorm1d(2)).eval()
    images = torch.randn(20, 3, 1).expand(20, 3, 5)
    with torch.no_grad():
        network[2].weight[0] = 0
        quantized, _ = kdq.quantize(network, [images], bits=2, correct="batchnorm")
        assert torch.equal(quantized(images)[:, 0], network(images)[:, 0])
        assert quantized(images).isfinite().all()


def test_wide_widths_are_left_alone_and_codes_of_others_are_their_own(relu_net: nn.Module) -> None:
    images = torch.randn(40, 3, 9, 9)
    (narrow, _), (wide, _) = quantize_widths(relu_net, [images], [3, 8], QuantConfig(correct="batchnorm"))
    alone, _ = kdq.quantize(relu_net, [images], bits=3, correct="batchnorm")
    for name, value in alone.state_dict().items():
        assert torch.equal(value, narrow.state_dict()[name]), name
    for name in ("norm.running_mean", "norm.running_var", "head.bias"):
        assert torch.equal(wide.state_dict()[name], relu_net.state_dict()[name])
        assert not torch.equal(narrow.state_dict()[name], relu_net.state_dict()[name])


def test_corrected_networks_are_stored_whole(relu_net: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(20, 3, 9, 9)
    quantized, _ = kdq.quantize(relu_net, [images], bits=2, correct="batchnorm")
    kdq.save(quantized, tmp_path / "a.kdq")
    loaded = kdq.load(tmp_path / "a.kdq", relu_net)
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))


def test_an_unknown_correction_is_refused(relu_net: nn.Module) -> None:
    with pytest.raises(KdqError, match="correct='both' is unknown: use one of null"):
        kdq.quantize(relu_net, [torch.randn(4, 3, 9, 9)], bits=2, correct="both")
