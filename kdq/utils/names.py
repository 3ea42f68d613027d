"""The stable names of kdq's own objects, for what is kept on disk: a moved or renamed function changes no key.

A config calls an object by its dotted path. What is stored or hashed names it by an entry of :data:`STABLE`, whichever
of its paths, old or new, was given. Whoever moves an object adds its new path here. Code of one's own keeps its path.
"""

from collections.abc import Mapping
from typing import Any


def _paths(rooms: str, **objects: str) -> dict[str, str]:
    """The paths of objects, given by their stable names, in each of these rooms."""
    return {f"kdq.{room}.{path}": name for room in rooms.split() for name, path in objects.items()}


#: Every dotted path that kdq's objects have or had, to the name that never changes. Names hold no dot, so that nothing
#: that can be imported has one.
STABLE: dict[str, str] = {
    **_paths("models models.networks", cifar_resnet="CifarResNet", whitened_net="WhitenedNet"),
    **_paths("models models.networks", resnet18="resnet18", resnet34="resnet34", resnet50="resnet50"),
    **_paths("models models.cifar", wide_resnet="WideResNet", cifar_vgg="CifarVGG"),
    **_paths("models models.cifar", cifar_mobilenet_v2="CifarMobileNetV2"),
    **_paths("models models.cifar", cifar_shufflenet_v1="CifarShuffleNetV1", cifar_shufflenet_v2="CifarShuffleNetV2"),
    **_paths("models models.reused", reused_classifier="reused_classifier"),
    **_paths("models models.libraries", timm_model="timm_model", torchvision_model="torchvision_model"),
    **_paths("distill distill.module", cross_entropy="Baseline"),
    **_paths("distill distill.module distill.cross_entropy", cross_entropy="CrossEntropy"),
    **{
        path: title.lower()
        for title in (
            *("VKD", "Mixup", "DKD", "DML", "FitNets", "AT", "SP", "RKD", "PKT", "NST", "VID", "ReviewKD", "CTKD"),
            *("BYOT", "CRD", "MLKD", "OFD", "SimKD"),
            *("DIST", "NKD", "TTM", "RLD", "TfKD", "Terms"),
        )
        for path in (f"kdq.distill.{title}", f"kdq.distill.{title.lower()}.{title}")
    },
    **_paths("distill.published", published_vkd="PublishedVKD", published_dkd="PublishedDKD"),
    **_paths("distill distill.qad", qad="QAD", qat="QAT"),
    **_paths("distill distill.config", train_config="TrainConfig"),
    **{
        path: solver
        for solver in ("gpfq", "gptq", "qronos", "rtn", "spfq")
        for path in (f"kdq.quant.{solver}.{solver}", f"kdq.quant.solvers.{solver}.{solver}")
    },
    **{
        path: alphabet
        for alphabet in ("uniform", "symmetric", "asymmetric", "ternary", "paper")
        for path in (f"kdq.quant.alphabets.{alphabet}", f"kdq.quant.solvers.alphabets.{alphabet}")
    },
    **_paths("quant quant.calibrate", sampled_moments="sampled.SampledMoments"),
    **_paths("quant.config", quant_config="QuantConfig", search_config="SearchConfig"),
    **_paths("quant", post_training_quantization="callback.PostTrainingQuantization"),
    **_paths("quant quant.bitsearch", greedy_bit_search="callback.GreedyBitSearch"),
    **_paths("train.halving", successive_halving="SuccessiveHalving"),
    **_paths("data.photographs", resized_crop="ResizedCrop"),
    **_paths("data.shards", webdataset="webdataset"),
    **_paths("data.sets data.folder", digits="digits", fashion_mnist="fashion_mnist", image_folder="image_folder"),
    **_paths("data.sets data.folder", cifar10="cifar10", cifar100="cifar100"),
}


def stable(config: Any) -> Any:
    """``config`` with the stable names of what it calls by ``_target_``, or by the ``path`` beside one.

    Example:
        >>> stable({"net": {"_target_": "kdq.models.CifarResNet", "depth": 20}, "solver": "gpfq"})
        {'net': {'_target_': 'cifar_resnet', 'depth': 20}, 'solver': 'gpfq'}
    """
    if isinstance(config, Mapping):
        called = ("_target_", "path") if "_target_" in config else ()
        named = {key: STABLE[config[key]] for key in called if config.get(key) in STABLE}
        return {key: named.get(key) or stable(value) for key, value in config.items()}
    return [stable(part) for part in config] if isinstance(config, (list, tuple)) else config
