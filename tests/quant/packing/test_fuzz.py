"""Thousands of damaged packed files: each is refused with one line, none is loaded as if nothing had happened."""

from pathlib import Path

import numpy as np
import pytest
import torch

import kdq
from kdq.models import CifarResNet
from kdq.models.build import build


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small mixed-precision network as a file."""
    torch.manual_seed(0)
    network = build(
        {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, "width": 0.25}
    )
    assert isinstance(network, CifarResNet)
    names = [name for name, module in network.named_modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    bits = {name: 2 + index % 7 for index, name in enumerate(names)}
    quantized, _ = kdq.quantize(network, [torch.randn(16, 1, 8, 8)], bits=bits, act_bits=8)
    path = tmp_path_factory.mktemp("packed") / "model.kdq"
    kdq.save(quantized, path)
    return path.read_bytes()


def _mutated(content: bytes, random: np.random.Generator) -> bytes:
    """One of: a flipped bit, a changed byte, a cut, a hole, a doubled piece, two pieces exchanged."""
    data = np.frombuffer(content, np.uint8).copy()
    # Half of the damage goes into the header, where the structure is.
    limit = len(data) if random.random() < 0.5 else 8 + int.from_bytes(content[:8], "little")
    at, to = sorted(random.integers(0, limit, 2))
    match random.integers(6):
        case 0:
            data[at] ^= np.uint8(1 << int(random.integers(8)))
        case 1:
            data[at] = random.integers(256)
        case 2:
            data = data[:at]
        case 3:
            data = np.delete(data, slice(at, to))
        case 4:
            data = np.insert(data, at, data[at:to])
        case _:
            data[at], data[to] = data[to], data[at]
    return data.tobytes()


def test_no_mutation_is_loaded(packed: bytes, tmp_path: Path) -> None:
    random, path, harmless = np.random.default_rng(0), tmp_path / "model.kdq", 0
    for _ in range(3000):
        content = _mutated(packed, random)
        path.write_bytes(content)
        if content == packed:
            harmless += 1
            continue
        with pytest.raises(kdq.KdqError) as refused:
            kdq.load(path)
        assert "\n" not in str(refused.value)
        assert str(path) in str(refused.value)
    assert harmless < 300
    path.write_bytes(packed)
    kdq.load(path)
