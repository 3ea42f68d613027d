"""The networks: torchvision's ResNets with either stem, the small CIFAR ResNets of He et al., the others on which the
distillation literature compares methods, a fast learner, torchvision's and timm's by name, and any with the classifier
of another."""

from kdq.models.cifar import CifarMobileNetV2, CifarShuffleNetV1, CifarShuffleNetV2, CifarVGG, WideResNet
from kdq.models.libraries import timm_model, torchvision_model
from kdq.models.networks import CifarResNet, WhitenedNet, resnet18, resnet34, resnet50
from kdq.models.reused import reused_classifier

__all__ = [
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarShuffleNetV1",
    "CifarShuffleNetV2",
    "CifarVGG",
    "WhitenedNet",
    "WideResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "reused_classifier",
    "timm_model",
    "torchvision_model",
]
