"""WebDataset's shards against the same photographs in folders, resumed epochs, ranks, and what strangers may pack."""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

import kdq.cli.app  # noqa: F401  the resolvers of conf/
from kdq.data.image_set import ImageSet
from kdq.data.images import Images
from kdq.data.loader import TrainLoader
from kdq.data.shards import webdataset
from kdq.utils.config import compose, plain
from kdq.utils.errors import KdqError
from tests.conftest import TINY

wds = pytest.importorskip("webdataset")

CPU = torch.device("cpu")
SHAPES, KINDS = [(60, 90), (120, 60), (40, 40), (61, 75), (50, 44)], ("jpg", "png", "webp", "jpeg", "jpg")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of photographs of several shapes and kinds, some of which lie on a side."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for part, count in (("train", 15), ("test", 4)):
        for name in ("cat", "dog"):
            (folder := root / part / name).mkdir(parents=True)
            for i in range(count):
                height, width = SHAPES[i % 5]
                exif = Image.Exif()
                exif[0x0112] = 1 + i % 8
                smooth = Image.fromarray(rng.integers(256, size=(6, 6, 3), dtype=np.uint8)).resize((width, height))
                smooth.save(folder / f"{i:02}.{KINDS[i % 5]}", exif=exif)
    return root


def pack(photographs: Path, root: Path, shards: int = 3) -> Path:
    """The same, in the same order, in ``shards`` tar files of each part, written by the library."""
    root.mkdir(parents=True)
    for part in ("train", "test"):
        files = sorted((photographs / part).rglob("*.*"))
        for shard in range(shards):
            with wds.TarWriter(str(root / f"{part}-{shard:03}.tar")) as writer:
                for file in files[shard * len(files) // shards : (shard + 1) * len(files) // shards]:
                    label = int(file.parent.name == "dog")
                    key = f"{file.parent.name}/{file.stem}"
                    writer.write({"__key__": key, file.suffix[1:]: file.read_bytes(), "cls": label, "json": {"x": 1}})
    return root


def images_of(data: str, root: Path, output: Path, *more: str) -> Images:
    asked = [f"data.root={root}", f"paths.data_dir={output}", "data.image_size=40", "data.augment.size=32"]
    asked += ["data.source.whole=true"] if data == "photographs" else ["data.num_classes=2"]
    config = compose([f"data={data}", *asked, "data.val_fraction=0.2", *more])
    return Images(instantiate(config.data.source), plain(config.data))


def epoch(images: Images, number: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[torch.Tensor, ...]]:
    return iter(
        TrainLoader(
            images.source("train", CPU), images.split.train, 6, preprocess=images.preprocess, augment=images.augment,
            seed=3, epoch=lambda: number, rank=rank, world_size=world_size, indexed=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("limit", [[], ["data.train_limit=13"]])
def test_shards_give_what_the_same_photographs_in_folders_give(
    photographs: Path, tmp_path: Path, limit: list[str]
) -> None:
    packed = pack(photographs, tmp_path / "shards")
    folders = images_of("photographs", photographs, tmp_path / "data", *limit)
    shards = images_of("webdataset", packed, tmp_path / "data", *limit)
    for part in ("train", "val"):
        assert torch.equal(getattr(folders.split, part), getattr(shards.split, part))
    loaders = [
        [*epoch(images, 2), *images.evaluation("val", CPU), *images.evaluation("test", CPU), *more]
        for images, more in ((found, found.calibration(9, 5, CPU)) for found in (folders, shards))
    ]
    assert len(loaders[0]) > 4
    for one, other in zip(*loaders, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert {key for key, value in folders.spec().items() if value != shards.spec()[key]} == {"train"}
    kept = {path.suffix for path in (tmp_path / "data" / "webdataset").iterdir()}
    assert kept == {".npy"}  # indices alone
    assert sum(path.stat().st_size for path in (tmp_path / "data" / "webdataset").iterdir()) < 6 * 1024


def test_an_epoch_that_is_resumed_goes_on_and_ranks_share_it(photographs: Path, tmp_path: Path) -> None:
    packed = pack(photographs, tmp_path / "shards")
    undisturbed = images_of("webdataset", packed, tmp_path)
    list(islice(epoch(undisturbed, 0), 2))  # nobody wants the rest
    whole = list(epoch(undisturbed, 1))
    resumed = images_of("webdataset", packed, tmp_path)
    halves = zip(*(epoch(resumed, 1, rank, 2) for rank in range(2)), strict=True)
    seen = []
    for (inputs, labels, places), parts in zip(whole, halves, strict=True):
        for value, own in zip((inputs, labels, places), zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(own), value)
        seen += places.tolist()
    assert len(set(seen)) == len(seen) == len(resumed.split.train) == 24
    tested = [torch.cat([x for x, _ in resumed.evaluation("test", CPU, rank, 3)]) for rank in range(3)]
    (expected, _), = undisturbed.evaluation("test", CPU)  # fmt: skip
    assert torch.equal(torch.cat(tested).flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)


def read(root: Path, cache: Path, train: str = "train*.tar", test: str = "test*.tar", **options: Any) -> ImageSet:
    asked: dict[str, Any] = {"image_size": 40, "in_channels": 3, "num_classes": 2} | options
    return webdataset(str(root), train, test, cache=str(cache), **asked)


def test_the_digest_is_of_the_images_and_the_index_is_kept(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three, one = (pack(photographs, tmp_path / f"{n}" / "shards", n) for n in (3, 1))
    found = read(three, tmp_path / "cache")
    assert read(one, tmp_path / "cache").train_digest == found.train_digest
    for changed in ({"image_size": 41}, {"in_channels": 1}, {"interpolation": "bicubic"}):
        assert read(three, tmp_path / "cache", **changed).train_digest != found.train_digest
    with monkeypatch.context() as patch:
        patch.setattr("kdq.data.shards._members", lambda *_: pytest.fail("read again"))
        assert read(three, tmp_path / "cache").test_digest == found.test_digest
        for kept in (tmp_path / "cache").glob("*.npy"):
            kept.write_bytes(kept.read_bytes()[:-8])
        with pytest.raises(pytest.fail.Exception):
            read(three, tmp_path / "cache")
    backwards = read(three, tmp_path / "cache", "train-{002..000}.tar")
    assert backwards.train_digest != found.train_digest
    assert sorted(backwards.train_labels.tolist()) == sorted(found.train_labels.tolist())
    content = bytearray((three / "test-000.tar").read_bytes())
    at = content.index(b"0" + bytes(511))  # a label
    content[at : at + 1] = b"1"
    (three / "test-000.tar").write_bytes(content)
    assert read(three, tmp_path / "cache").test_digest != found.test_digest


def test_patterns_name_what_there_is(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = pack(photographs, tmp_path / "a"), tmp_path / "cache"
    flat = read(root, cache).train_digest
    for part in ("train", "test"):
        (tmp_path / "b" / part).mkdir(parents=True)
        for file in root.glob(f"{part}*"):
            os.link(file, tmp_path / "b" / part / file.name)
    assert read(tmp_path / "b", cache, "train{/*,*}.tar", "test{/*,*}.tar").train_digest == flat
    assert read(tmp_path, cache, f"{root}/train-{{000..002}}.tar", "a/test-000.tar").train_digest == flat
    assert read(root, cache, ["train-000.tar", "train-{001..002}.tar"]).train_digest == flat
    for asked in ("x/a-{00..12}.tar", "['b-*.tar', c.tar]"):
        quoted = asked if asked[0] == "[" else f'"{asked}"'
        found = compose(["data=webdataset", "data.num_classes=2", f"data.train={quoted}"]).data.source.train
        assert found == (["b-*.tar", "c.tar"] if asked[0] == "[" else asked)
    for train, answer in (
        ("train-{000..003}.tar", r"no file \S+/train-003.tar"),
        ("tain*.tar", r"no file \S+/tain\*.tar"),
        ("train-{000.tar", "is no pattern"),
        ("http://example.org/{0..9}.tar", "no file .*example.org/0.tar"),
        ("pipe:touch ran", "no file .*pipe:touch ran"),
        (3, "data.test=3 is no pattern"),
        ("{train,test}-000.tar", "test-000.tar is a shard of both"),
    ):
        with pytest.raises(KdqError, match=answer):
            read(root, cache, train)
    os.mkfifo(root / "train-003.tar")
    with pytest.raises(KdqError, match=r"no file \S+/train-003.tar"):
        read(root, cache)
    monkeypatch.setitem(__import__("sys").modules, "webdataset.shardlists", None)
    with pytest.raises(KdqError, match=r"pip install 'kdq\[webdataset\]'"):
        read(root, cache)


def png(width: int, height: int, bits: int = 8) -> bytes:
    """An image that says it has this size; its pixels are black or missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(height * (1 + width * bits // 8)) if width * height < 10**6 else b"")
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tar(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of two good samples around these members."""
    good = [(f"{name}.{suffix}", data) for name in "az" for suffix, data in (("png", png(50, 60)), ("cls", b"1"))]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as file:
        for name, data in (*good[:2], *members, *good[2:]):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if (name, data) in members:
                member.type, member.linkname = kind, "a.png" if kind != tarfile.REGTYPE else ""
            file.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def header(name: str, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def sample(image: bytes = png(50, 60), label: bytes = b"1", suffix: str = "png") -> bytes:
    return tar((f"k.{suffix}", image), ("k.cls", label))


WHOLE, AT = tar(("k.png", png(50, 60)), ("k.cls", b"1")), 4 * 512
BACK = header("back.png", -4 * 512, tarfile.REGTYPE)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "climbs out": (tar(("../k.png", png(50, 60)), ("../k.cls", b"1")), r"'\.\./k\.png' is no name"),
    "absolute": (tar(("/k.png", png(50, 60))), r"'/k\.png' is no name"),
    "name of a terminal": (tar(("k\x1b[2J.png", b"")), r"'k\\x1b\[2J\.png' is no name"),
    "long name": (tar(("k" * 5000 + ".png", b"")), r"'kkk\S+' is no name"),
    "name of megabytes": (tar(("k" * 10**6 + ".png", b"")), r"LongLink' of 10000\d\d bytes is cut off, or too long"),
    "symbolic link": (tar(("k.png", b""), kind=tarfile.SYMTYPE), r"'k\.png' is a link or a device"),
    "hard link": (tar(("k.png", b""), kind=tarfile.LNKTYPE), r"'k\.png' is a link or a device"),
    "pipe": (tar(("k.png", b""), kind=tarfile.FIFOTYPE), r"'k\.png' is a link or a device"),
    "sparse": (tar(("k.png", b""), kind=tarfile.GNUTYPE_SPARSE), r"'k\.png' is a link or a device"),
    "goes back": (WHOLE[:AT] + BACK + WHOLE[AT:], r"'back\.png' of -2048 bytes is cut off"),
    "more than there is": (WHOLE[:AT] + header("k.png", 2**34, tarfile.REGTYPE), r"'k\.png' of \d+ bytes is cut off"),
    "cut in an image": (WHOLE[: AT + 530], r"'k\.png' of \d+ bytes is cut off"),
    "cut between files": (WHOLE[:AT], "cut off"),
    "empty": (b"", "cut off"),
    "damaged header": (WHOLE[:AT] + b"\xff" + WHOLE[AT + 1 :], "bad checksum"),
    "compressed": (b"\x1f\x8b" + bytes(range(256)) * 20, "it must be a whole, plain tar"),
    "joined": (WHOLE + WHOLE, "goes on after its end"),
    "no samples": (tar()[-1024:], "holds no key.jpg beside a key.cls"),
    "no label": (tar(("k.png", png(50, 60))), r"'k' of \S+ has png: it must"),
    "no image": (tar(("k.cls", b"1")), r"'k' of \S+ has cls: it must"),
    "image elsewhere": (tar(("k.cls", b"1"), ("l.txt", b""), ("k.png", png(50, 60))), r"'k' of \S+ has cls: it must"),
    "dot in a key": (
        tar(("k.png", png(50, 60)), ("k.cls", b"1"), ("l.2.png", png(50, 60)), ("l.2.cls", b"0")),
        r"'l' of \S+ has 2\.png, 2\.cls: it must .*\(a key ends at its first dot\)",
    ),
    "two labels": (tar(("k.png", png(50, 60)), ("k.cls", b"1"), ("k.cls", b"0")), r"k\.cls: duplicate"),
    "two images": (tar(("k.png", png(50, 60)), ("k.jpg", b""), ("k.cls", b"1")), r"'k' of \S+ has jpg, png, cls"),
    "label a word": (sample(label=b"cat"), r"label of 'k' of \S+ is 'cat': it must be from 0 to 1"),
    "label too large": (sample(label=b"2"), r"label of 'k' of \S+ is '2'"),
    "label negative": (sample(label=b"-1"), r"label of 'k' of \S+ is '-1'"),
    "label of digits": (sample(label=b"1" * 10**5), r"label of 'k' of \S+ is '1111"),
    "label empty": (sample(label=b""), r"label of 'k' of \S+ is ''"),
    "no image inside": (sample(b"none"), r"cannot read the image 'k' of \S+ \(none of JPEG, PNG, WEBP\)"),
    "postscript": (sample(b"%!PS-Adobe-3.0 EPSF-3.0\n"), r"cannot read the image 'k' of \S+ \(none of"),
    "bomb": (sample(png(60_000, 60_000)), r"cannot read the image 'k' of \S+ \(Image size"),
    "line": (sample(png(10**6, 1)), r"'k' of \S+ has a side of more than"),
    "16 bits": (sample(png(50, 60, 16)), r"'k' of \S+ has more than 8 bits"),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_strangers_pack_is_refused_in_a_line_that_names_it(name: str, tmp_path: Path) -> None:
    content, answer = HOSTILE[name]
    (root := tmp_path / "a" / "shards").mkdir(parents=True)
    (root / "test.tar").write_bytes(WHOLE)
    (root / "train.tar").write_bytes(content)
    with pytest.raises(KdqError, match=answer) as caught:
        read(root, tmp_path / "cache")
    assert str(root / "train.tar") in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert {path.name for path in tmp_path.rglob("*")} - {"cache"} == {"a", "shards", "train.tar", "test.tar"}


def test_an_image_is_not_read_where_it_is_huge(tmp_path: Path) -> None:
    whole = io.BytesIO(WHOLE[:AT] + header("k.png", 2**29, tarfile.REGTYPE))
    with (tmp_path / "train.tar").open("wb") as file:  # a file with a hole
        file.write(whole.getvalue())
        file.seek(2**29, 1)
        file.write(WHOLE[AT + 1024 :])
    (tmp_path / "test.tar").write_bytes(WHOLE)
    with pytest.raises(KdqError, match=r"image 'k' of \S+train.tar has 536870912 bytes"):
        read(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_kind_of_tar_are_whole(form: int, tmp_path: Path) -> None:
    long = "much/" * 18 + "k" * 60 if form == tarfile.USTAR_FORMAT else "käse/" * 60 + "k" * 200
    for part, label in (("train", b" 1\n"), ("test", b"0")):
        samples = ((f"{long}1.png", png(50, 60)), (f"{long}1.cls", b"1"), (f"{long}2.cls", label))
        (tmp_path / f"{part}.tar").write_bytes(tar(*samples, (f"{long}2.PNG", png(60, 50)), form=form))
    found = read(tmp_path, tmp_path / "cache")
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([1, 1, 1, 1], [1, 1, 0, 1])


def test_what_is_damaged_behind_its_header_is_named_when_it_is_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.effect_noise((90, 60), 90).convert("RGB").save(stream, "JPEG")
    (tmp_path / "train.tar").write_bytes(sample(stream.getvalue()[:-900], suffix="jpg"))
    (tmp_path / "test.tar").write_bytes(WHOLE)
    found = read(tmp_path, tmp_path / "cache")
    for reading in (found.train_images.whole, found.train_images.__getitem__):  # type: ignore[union-attr]
        with pytest.raises(KdqError, match=rf"cannot read the image 'k\.jpg' of {tmp_path}/train\.tar \(.*truncated"):
            reading(torch.arange(3))
    (tmp_path / "train.tar").write_bytes(bytes(3) + (tmp_path / "train.tar").read_bytes())
    with pytest.raises(KdqError, match="was changed while kdq ran"):
        found.train_images[torch.tensor([0])]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_shards_are_read_or_refused(photographs: Path, tmp_path: Path) -> None:
    root, rng, refused = pack(photographs, tmp_path / "shards", 1), np.random.default_rng(0), list[str]()
    whole = (root / "test-000.tar").read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    for turn in range(150):
        content, start = bytearray(whole), int(rng.choice(headers))
        at = start + int(rng.integers(0, 512)) if turn % 2 else int(rng.integers(len(whole)))
        match turn % 6:
            case 0 | 1:
                content[at] = int(rng.integers(256))
            case 2:
                del content[at:]
            case 3:
                del content[at : at + 512]
            case _:  # a size, of a sound header
                content[start + 124 : start + 136] = bytes(rng.choice([0, 0x31, 0x37, 0x80, 0xFF], 12).tolist())
                content[start + 148 : start + 156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
        (root / "test-000.tar").write_bytes(content)
        try:
            found = read(root, tmp_path / "cache")
            found.test_images[torch.arange(len(found.test_labels))]
        except KdqError as error:
            refused.append(str(error))
    assert len(refused) > 80
    assert all("test-000.tar" in line and line.isprintable() for line in refused)


def test_a_sweep_runs_on_shards_and_a_wrong_label_stops_it(cli: Any, photographs: Path, tmp_path: Path) -> None:
    root = pack(photographs, tmp_path / "shards")
    asked = ("data=webdataset", f"data.root={root}", "data.image_size=24", "data.augment.size=16", "method=baseline")
    small = (*asked, "data.num_classes=2", *TINY, "quant=rtn", "quant.bits=4", "data.train_limit=16")
    small = (*small, "student.recipe.epochs=1", "student.recipe.batch_size=8")
    code, _, err = cli(*small)
    assert code == 0, err
    assert len(list((tmp_path / "rows").glob("*.json"))) == 1
    (root / "train-003.tar").write_bytes(sample(label=b"7"))
    for wrong, answer in (((*small, "data.train=train-*.tar"), "label of 'k' of"), (asked, "data.num_classes has no")):
        code, _, err = cli(*wrong)
        assert code == 1
        assert answer in err.splitlines()[-1]
        assert "Traceback" not in err
