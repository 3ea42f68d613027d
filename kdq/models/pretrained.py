"""torchvision's ImageNet weights as the start of a training on other images and classes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models import get_model_weights

from kdq.models.libraries import fetched
from kdq.models.weights import read_state_dict
from kdq.utils.errors import KdqError

#: The architectures of kdq.models that torchvision publishes weights for.
PUBLISHED = ("resnet18", "resnet34", "resnet50")


def load_imagenet(network: nn.Module, net: Mapping[str, Any]) -> None:
    """Copy torchvision's weights for ``net`` into ``network``, in place; the classifier keeps its random ones."""
    architecture = str(net["_target_"]).rpartition(".")[2]
    if architecture not in PUBLISHED:
        raise KdqError(f"there are no ImageNet weights for {architecture}: they exist for {', '.join(PUBLISHED)}")
    published = read_state_dict(fetched(get_model_weights(architecture)["IMAGENET1K_V1"]))
    network.load_state_dict(adapt(published, network.state_dict()))


def adapt(published: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``own`` with every tensor of ``published`` that fits it.

    The first convolution is made to fit: a smaller kernel takes the centre of the published one, and fewer input
    channels take the sum over the published ones, the answer to a grey image.
    """
    state = dict(own)
    for name, tensor in published.items():
        if name == "conv1.weight":
            channels, size = own[name].shape[1], own[name].shape[-1]
            if channels != tensor.shape[1]:
                tensor = tensor.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1) / channels
            margin = (tensor.shape[-1] - size) // 2
            tensor = tensor[:, :, margin : margin + size, margin : margin + size]
        if not name.startswith("fc."):
            state[name] = tensor.contiguous()
    return state
