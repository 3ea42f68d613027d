"""The named sets, read from files in the formats they are published in."""

import gzip
import hashlib
import pickle
import struct
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from kdq.data.images import Images
from kdq.data.sets import cifar10, cifar100, digits, fashion_mnist
from kdq.utils.errors import KdqError
from tests.conftest import data_config


def test_digits_are_scikit_learns_images_on_eight_bits() -> None:
    from sklearn.datasets import load_digits

    raw, found = load_digits(), digits()
    assert found.train_images.shape == (1438, 8, 8, 1)
    assert found.test_images.shape == (359, 8, 8, 1)
    assert found.test_images.dtype == torch.uint8
    np.testing.assert_array_equal(found.test_labels.numpy(), raw.target[4::5])
    np.testing.assert_allclose(found.test_images[..., 0].numpy() / 255, raw.images[4::5] / 16, atol=0.5 / 255)


def test_digest_changes_with_one_pixel() -> None:
    from dataclasses import replace

    found = digits()
    pixels = found.train_images.clone()
    pixels[0, 0, 0, 0] += 1
    other = replace(found, train_images=pixels)
    assert found.train_digest == digits().train_digest != other.train_digest
    assert found.test_digest == digits().test_digest == other.test_digest


@pytest.mark.parametrize(
    ("given", "says"), [({"mean": [0.5]}, "belong together"), ({"mean": [0.5], "std": [0.0]}, "must be above zero")]
)
def test_half_a_normalisation_is_refused(given: dict[str, list[float]], says: str) -> None:
    with pytest.raises(KdqError, match=says):
        Images(digits(), data_config(**given))


def _idx(array: np.ndarray) -> bytes:
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes())


def _write_fashion(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The four archives of Fashion-MNIST as a distribution ships them, with few images."""
    random = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": random.integers(0, 256, (30, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": random.integers(0, 10, 30).astype(np.uint8),
        "t10k-images-idx3-ubyte": random.integers(0, 256, (20, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": random.integers(0, 10, 20).astype(np.uint8),
    }
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for name, array in arrays.items():
        content = _idx(array)
        (raw / f"{name}.gz").write_bytes(content)
        # A distribution compresses the files anew: its archives do not have the published checksums.
        resources.append((f"{name}.gz", "0" * 32))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    return arrays


def test_fashion_mnist_is_read_from_archives_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = _write_fashion(tmp_path, monkeypatch)
    found = fashion_mnist(str(tmp_path))
    np.testing.assert_array_equal(found.train_images[..., 0].numpy(), arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(found.test_labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert found.classes[9] == "Ankle boot"
    assert not list(tmp_path.glob(".fetch-*"))


def test_a_corrupt_archive_is_an_error_that_names_folder_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_fashion(tmp_path, monkeypatch)
    archive = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(KdqError, match=r"Fashion-MNIST is not in .*put FashionMNIST/raw/train-images"):
        fashion_mnist(str(tmp_path))
    assert not (tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").exists()


def _write_cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, dataset: type[CIFAR10], batches: dict[str, int], labels: str
) -> None:
    """A CIFAR archive with few images in the published pickle format."""
    random = np.random.default_rng(1)
    meta = {str(dataset.meta["key"]): [f"class {i}" for i in range(100 if labels == "fine_labels" else 10)]}
    files = {dataset.meta["filename"]: meta}
    for name, count in batches.items():
        files[name] = {
            "data": random.integers(0, 256, (count, 3072), np.uint8),
            labels: random.integers(0, len(meta[dataset.meta["key"]]), count).tolist(),
        }
    digests = {}
    with tarfile.open(root / dataset.filename, "w:gz") as archive:
        for name, content in files.items():
            data = pickle.dumps(content)
            digests[name] = hashlib.md5(data).hexdigest()
            entry = tarfile.TarInfo(f"{dataset.base_folder}/{name}")
            entry.size = len(data)
            archive.addfile(entry, BytesIO(data))
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5((root / dataset.filename).read_bytes()).hexdigest())
    train = [[name, digests[name]] for name in batches if "test" not in name]
    monkeypatch.setattr(dataset, "train_list", train)
    monkeypatch.setattr(dataset, "test_list", [[name, digests[name]] for name in batches if "test" in name])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": digests[dataset.meta["filename"]]})
    monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/cifar.tar.gz")


@pytest.mark.parametrize(
    ("read", "dataset", "batches", "labels", "classes"),
    [
        (cifar10, CIFAR10, {"data_batch_1": 8, "data_batch_2": 8, "test_batch": 5}, "labels", 10),
        (cifar100, CIFAR100, {"train": 9, "test": 4}, "fine_labels", 100),
    ],
)
def test_cifar_is_read_from_its_archive(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[str], object],
    dataset: type[CIFAR10],
    batches: dict[str, int],
    labels: str,
    classes: int,
) -> None:
    _write_cifar(tmp_path, monkeypatch, dataset, batches, labels)
    found = read(str(tmp_path))
    train = sum(count for name, count in batches.items() if "test" not in name)
    assert found.train_images.shape == (train, 32, 32, 3)
    assert len(found.test_labels) == sum(batches.values()) - train
    assert len(found.classes) == classes
    first = next(iter(batches))
    with (tmp_path / dataset.base_folder / first).open("rb") as stream:
        planes = pickle.load(stream)["data"][0].reshape(3, 32, 32)
    np.testing.assert_array_equal(found.train_images[0].numpy(), planes.transpose(1, 2, 0))


def test_a_missing_set_without_network_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(KdqError, match=rf"CIFAR-10 is not in {tmp_path}.*put cifar-10-python.tar.gz there"):
        cifar10(str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != ".download.lock"] == []
