"""The stable names of kdq's own objects, for what is kept on disk: a moved or renamed function changes no key.

A config calls an object by its dotted path. What is stored or hashed names it by an entry of :data:`STABLE`, whichever
of its paths, old or new, was given. Whoever moves an object adds its new path here. Code of one's own keeps its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _paths(name: str, *paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, name)


#: Every dotted path that kdq's objects have or had, to the name that never changes. Names hold no dot, so that nothing
#: that can be imported has one.
STABLE: dict[str, str] = {
    **{
        path: name
        for name, title, module in (
            ("cifar_resnet", "CifarResNet", "networks"),
            ("whitened_net", "WhitenedNet", "networks"),
            ("wide_resnet", "WideResNet", "cifar"),
            ("cifar_vgg", "CifarVGG", "cifar"),
            ("cifar_mobilenet_v2", "CifarMobileNetV2", "cifar"),
            ("cifar_shufflenet_v1", "CifarShuffleNetV1", "cifar"),
            ("cifar_shufflenet_v2", "CifarShuffleNetV2", "cifar"),
            *((name, name, "networks") for name in ("resnet18", "resnet34", "resnet50")),
            *((name, name, "libraries") for name in ("timm_model", "torchvision_model")),
        )
        for path in (f"kdq.models.{title}", f"kdq.models.{module}.{title}")
    },
    **_paths(
        "cross_entropy",
        "kdq.distill.Baseline",
        "kdq.distill.module.Baseline",
        "kdq.distill.CrossEntropy",
        "kdq.distill.module.CrossEntropy",
        "kdq.distill.cross_entropy.CrossEntropy",
    ),
    **{
        path: title.lower()
        for title in (
            *("VKD", "Mixup", "DKD", "DML", "FitNets", "AT", "SP", "RKD", "PKT", "NST", "VID", "ReviewKD", "CTKD"),
            *("BYOT", "CRD", "MLKD", "OFD"),
            *("DIST", "NKD", "TTM", "RLD", "TfKD", "Terms"),
        )
        for path in (f"kdq.distill.{title}", f"kdq.distill.{title.lower()}.{title}")
    },
    **_paths("published_vkd", "kdq.distill.published.PublishedVKD"),
    **_paths("published_dkd", "kdq.distill.published.PublishedDKD"),
    **_paths("qad", "kdq.distill.QAD", "kdq.distill.qad.QAD"),
    **_paths("qat", "kdq.distill.QAT", "kdq.distill.qad.QAT"),
    **_paths("train_config", "kdq.distill.TrainConfig", "kdq.distill.config.TrainConfig"),
    **{
        f"kdq.quant{room}.{solver}.{solver}": solver
        for solver in ("gpfq", "gptq", "qronos", "rtn", "spfq")
        for room in ("", ".solvers")
    },
    **{
        f"kdq.quant{room}.alphabets.{alphabet}": alphabet
        for alphabet in ("uniform", "symmetric", "asymmetric", "ternary", "paper")
        for room in ("", ".solvers")
    },
    **_paths("sampled_moments", "kdq.quant.sampled.SampledMoments", "kdq.quant.calibrate.sampled.SampledMoments"),
    **_paths("resized_crop", "kdq.data.photographs.ResizedCrop"),
    **_paths("quant_config", "kdq.quant.config.QuantConfig"),
    **_paths("search_config", "kdq.quant.config.SearchConfig"),
    **_paths("post_training_quantization", "kdq.quant.callback.PostTrainingQuantization"),
    **_paths("greedy_bit_search", "kdq.quant.callback.GreedyBitSearch", "kdq.quant.bitsearch.callback.GreedyBitSearch"),
    **{
        f"kdq.data.{module}.{images}": images
        for module in ("sets", "folder")
        for images in ("digits", "fashion_mnist", "cifar10", "cifar100", "image_folder")
    },
}


def stable(config: Any) -> Any:
    """``config`` with the stable names of what it calls by ``_target_``, or by the ``path`` beside one.

    Example:
        >>> stable({"net": {"_target_": "kdq.models.CifarResNet", "depth": 20}, "solver": "gpfq"})
        {'net': {'_target_': 'cifar_resnet', 'depth': 20}, 'solver': 'gpfq'}
    """
    if isinstance(config, Mapping):
        called = ("_target_", "path") if "_target_" in config else ()
        return {key: _named(value) if key in called else stable(value) for key, value in config.items()}
    return [stable(part) for part in config] if isinstance(config, (list, tuple)) else config


def _named(target: Any) -> Any:
    return STABLE.get(target, target) if isinstance(target, str) else target
