"""A network that ends with the classifier of a larger one (SimKD: Chen et al. 2022, arXiv 2203.14001)."""

from collections import OrderedDict

from torch import nn


def reused_classifier(net: nn.Module, maps: str, classifier: str, channels: int, features: int) -> nn.Module:
    """``net`` with a projector behind its layer ``maps`` and another linear layer in the place of its ``classifier``.

    The projector is a bottleneck of a 1x1, a 3x3 and a 1x1 convolution, each with BatchNorm and ReLU, half as wide
    inside as what it gives.

    >>> from kdq.models import CifarResNet
    >>> student = CifarResNet(8, num_classes=10)
    >>> network = reused_classifier(student, maps="layer3", classifier="fc", channels=64, features=256)
    >>> network.layer3.projector, network.fc
    (Projector(64, 256), Linear(in_features=256, out_features=10, bias=True))

    Args:
        net: the network, which is changed.
        channels: of what ``maps`` gives.
        features: what the other network's classifier takes.
    """
    projected = OrderedDict(maps=net.get_submodule(maps), projector=Projector(channels, features))
    net.set_submodule(maps, nn.Sequential(projected))
    linear = net.get_submodule(classifier)
    assert isinstance(linear, nn.Linear)
    net.set_submodule(classifier, nn.Linear(features, linear.out_features))
    inner, names = getattr(net, "kdq_net", None), {"maps": maps, "classifier": classifier}
    if inner is not None:
        sizes = {"channels": channels, "features": features}
        net.kdq_net = {"_target_": "kdq.models.reused_classifier", "net": inner, **names, **sizes}  # type: ignore[assignment]
    net.kdq_reused = names  # type: ignore[assignment]
    return net


class Projector(nn.Sequential):
    """From maps of ``channels`` to maps of ``features`` channels; see :func:`reused_classifier`."""

    def __init__(self, channels: int, features: int) -> None:
        middle, layers = max(1, features // 2), list[nn.Module]()
        for into, out, size in ((channels, middle, 1), (middle, middle, 3), (middle, features, 1)):
            layers += [nn.Conv2d(into, out, size, padding=size // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        super().__init__(*layers)
        self.sizes = channels, features

    def __repr__(self) -> str:
        return f"Projector{self.sizes}"
