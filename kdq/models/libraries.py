"""Networks of torchvision's and timm's by name, and what their published weights want to see of an image."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import Weights, get_model_builder, get_model_weights

from kdq.models.networks import Channels, Renormalize
from kdq.models.weights import locate
from kdq.utils.errors import KdqError

#: The value of ``weights`` that asks for the published ones.
IMAGENET = "imagenet"
#: Networks of torchvision's that, when they have weights, turn ImageNet's normalisation into this one themselves, and
#: that have a second classifier where they are trained from the start.
_HALVES = dict.fromkeys(("googlenet", "inception_v3"), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Preprocessing:
    """What published weights were evaluated on; ``mean`` and ``std`` are of each channel, on the scale 0 to 1."""

    size: int  # pixels of the square that is cut from the centre
    shorter: int  # pixels of the shorter side that an image is scaled to before
    interpolation: str  # nearest, bilinear or bicubic
    mean: tuple[float, ...]
    std: tuple[float, ...]


def torchvision_model(
    name: str,
    num_classes: int = 1000,
    mean: Channels = None,
    std: Channels = None,
    data_mean: Channels = None,
    data_std: Channels = None,
    **options: Any,
) -> nn.Module:
    """The classification network ``name`` of torchvision's, with random weights.

    Args:
        mean, std: the normalisation it wants; None: as the images come.
        data_mean, data_std: that of the images.
        options: what torchvision's builder takes.

    >>> torchvision_model("squeezenet1_1", num_classes=10)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])

    Raises:
        KdqError: torchvision has no such network.
    """
    if name.lower() in _HALVES:  # as torchvision reads names
        options = {"aux_logits": False, "init_weights": True} | options
    builder = _known(get_model_builder, name)
    return _renormalized(builder(weights=None, num_classes=num_classes, **options), mean, std, data_mean, data_std)


def timm_model(
    name: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    mean: Channels = None,
    std: Channels = None,
    data_mean: Channels = None,
    data_std: Channels = None,
    **options: Any,
) -> nn.Module:
    """The network ``name`` of timm's, with random weights; the arguments are those of :func:`torchvision_model`, and
    ``options`` what ``timm.create_model`` takes.

    Raises:
        KdqError: timm is not installed, or has no such network.
    """
    network = _timm(name).create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
    return _renormalized(network, mean, std, data_mean, data_std)


def preprocessing(target: str, name: str, weights: str | None) -> Preprocessing | None:
    """What ``weights`` of a network of a library want to see; None where there are none, or ``target`` is of none.

    Args:
        target: the dotted path of :func:`torchvision_model` or :func:`timm_model`, or of anything else.
        weights: :data:`IMAGENET`, the name of a set of torchvision's, or a file, whose images are as those of
            :data:`IMAGENET`.

    >>> preprocessing("kdq.models.torchvision_model", "resnet50", "imagenet").size
    224
    """
    library = _library(target)
    if library is None or weights is None:
        return None
    if library == "timm_model":
        config = _timm_config(name)
        size = int(config.input_size[-1])
        return Preprocessing(size, round(size / config.crop_pct), config.interpolation, config.mean, config.std)
    asked = _published(name, weights).transforms()
    halves = _HALVES.get(name.lower())
    normal = (halves, halves) if halves else (tuple(asked.mean), tuple(asked.std))
    return Preprocessing(asked.crop_size[0], asked.resize_size[0], asked.interpolation.value, *normal)


def asked_of_images(target: str, name: str, weights: str | None, field: str, otherwise: Any = None) -> Any:
    """A ``field`` of their :func:`preprocessing`: the resolver ``${preprocessing:...}`` of conf/model and conf/data."""
    found = preprocessing(target, name, weights)
    value = otherwise if found is None else getattr(found, field)
    return list(value) if isinstance(value, tuple) else value


def weights_of(source: str, net: Mapping[str, Any]) -> Path | None:
    """The file with the weights that ``source`` names; a library's published ones are fetched into the folder that
    the library keeps them in. None: they are in no file, but kdq's to make of others."""
    library = _library(str(net["_target_"]))
    if library == "timm_model" and source == IMAGENET:
        config = _timm_config(net["name"])
        if not config.hf_hub_id:
            raise KdqError(f"timm publishes no weights {net['name']!r}: timm.list_pretrained() names those it does")
        file = f":{config.hf_hub_filename}" if config.hf_hub_filename else ""
        return locate(f"hf:{config.hf_hub_id}{file}")
    if library == "torchvision_model" and source in (IMAGENET, *_known(get_model_weights, net["name"]).__members__):
        return fetched(_published(net["name"], source))
    return None if source == IMAGENET else locate(source)


def fetched(weights: Weights) -> Path:
    """The file of torchvision's published ``weights``."""
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if not path.is_file():
        try:
            weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise KdqError(
                f"cannot fetch the weights {weights} (no network?): put {path.name} into {path.parent}"
            ) from error
    return path


def _renormalized(
    network: nn.Module, mean: Channels, std: Channels, data_mean: Channels, data_std: Channels
) -> nn.Module:
    """The network behind the normalisation that its weights were trained with, where that is not the images' own."""
    own, data = ([list(values or ()) for values in pair] for pair in ((mean, std), (data_mean, data_std)))
    if own in ([[], []], data):
        return network
    first = Renormalize(mean, std, data_mean, data_std, in_channels=len(mean or std or ()))
    return nn.Sequential(OrderedDict(renormalize=first, network=network))


def _library(target: str) -> str | None:
    name = target.rpartition(".")[2]
    return name if name in ("torchvision_model", "timm_model") and target.startswith("kdq.models.") else None


def _known(look_up: Callable[[str], Any], name: str) -> Any:
    """What torchvision has by the ``name`` of a network."""
    try:
        return look_up(name)
    except ValueError as error:
        raise KdqError(f"torchvision has no network {name!r}: torchvision.models.list_models() names them") from error


def _published(name: str, weights: str) -> Weights:
    listed = _known(get_model_weights, name)
    return listed[weights if weights in listed.__members__ else "DEFAULT"]


def _timm(name: str) -> Any:
    """timm, which has a network ``name``."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise KdqError("model=timm needs timm: pip install timm") from error
    if name.partition(".")[0] not in timm.list_models():
        raise KdqError(f"timm has no network {name!r}: timm.list_models() names them")
    return timm


def _timm_config(name: str) -> Any:
    try:
        return _timm(name).get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise KdqError(f"timm publishes no weights {name!r}: timm.list_pretrained() names those it does") from error
