"""The networks: torchvision's ResNets with either stem, the small CIFAR ResNets of He et al., and a fast learner."""

from kdq.models.networks import CifarResNet, WhitenedNet, resnet18, resnet34, resnet50

__all__ = ["CifarResNet", "WhitenedNet", "resnet18", "resnet34", "resnet50"]
