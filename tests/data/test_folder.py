"""Image folders: decoding, the cache, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from kdq.data.folder import class_names, decode_image, image_folder
from kdq.data.sets import cifar10
from kdq.data.split import split
from kdq.utils.errors import KdqError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of PNG images, 6x6 pixels."""
    random = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "pets"


def test_images_and_labels_are_those_of_the_files(root: Path, tmp_path: Path) -> None:
    (root / "train/dog/.ipynb_checkpoints").mkdir()
    (root / "train/dog/.ipynb_checkpoints/1-checkpoint.png").write_bytes((root / "train/dog/1.png").read_bytes())
    found = image_folder(str(root), 6, 3, str(tmp_path / "cache"))
    assert found.classes == ("cat", "dog")
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(found.train_images[4].numpy(), np.asarray(Image.open(root / "train/dog/1.png")))


def test_second_reading_takes_the_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = image_folder(str(root), 6, 3, str(tmp_path / "cache"))
    (decoded,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert decoded.stat().st_mode & 0o777 == 0o755  # for others, too
    monkeypatch.setattr("kdq.data.folder.decode_image", lambda *_: pytest.fail("decoded again"))
    assert image_folder(str(root), 6, 3, str(tmp_path / "cache")).train_digest == first.train_digest


def test_a_changed_file_is_decoded_anew_and_a_moved_folder_has_the_same_digest(root: Path, tmp_path: Path) -> None:
    first = image_folder(str(root), 6, 3, str(tmp_path / "cache")).train_digest
    shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert image_folder(str(tmp_path / "elsewhere"), 6, 3, str(tmp_path / "cache2")).train_digest == first
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(root / "train/cat/0.png")
    assert image_folder(str(root), 6, 3, str(tmp_path / "cache")).train_digest != first


def test_other_sizes_are_scaled_and_cropped_and_grey_is_one_channel(root: Path, tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # the centre, which the crop keeps
    Image.fromarray(wide).save(root / "test/cat/0.png")
    found = image_folder(str(root), 4, 1, str(tmp_path / "cache"))
    assert found.test_images.shape == (4, 4, 4, 1)
    assert found.test_images[0, :, 1:3].min() > 150


def test_a_corrupt_image_is_named_and_leaves_no_cache(root: Path, tmp_path: Path) -> None:
    bad = root / "train/dog/2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(KdqError, match=f"cannot read the image {bad}"):
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("whole", [False, True])
def test_decoding_that_was_killed_goes_on_and_ends_as_if_undisturbed(root: Path, tmp_path: Path, whole: bool) -> None:
    Image.fromarray(np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)).save(root / "train/cat/1.png")
    Image.fromarray(np.arange(7 * 6 * 3, dtype=np.uint8).reshape(7, 6, 3)).save(root / "train/dog/2.png")
    expected = image_folder(str(root), 6, 3, str(tmp_path / "other"), whole=whole)
    code = f"""
import os
import kdq.data.folder as folder

folder.KEPT_EVERY, kept = 2, folder.write_text

def killed(path, text):
    kept(path, text)
    if text == "4":
        os.kill(os.getpid(), 9)

folder.write_text = killed
folder.image_folder({str(root)!r}, 6, 3, {str(tmp_path / "cache")!r}, whole={whole})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    decoded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kdq.data.folder.decode_image", lambda file, **how: decoded.append(file) or decode_image(file, **how)
        )
        found = image_folder(str(root), 6, 3, str(tmp_path / "cache"), whole=whole)
    assert sorted(file.parent.parent.name for file in decoded) == ["test"] * 4 + ["train"] * 2
    assert found.train_digest == expected.train_digest
    names = [{path.name for path in (tmp_path / cache).glob("*/*")} for cache in ("cache", "other")]
    assert names[0] == names[1]
    assert ("train_pixels" in names[0], "train_images.npy" in names[0]) == (whole, not whole)


@pytest.mark.parametrize("whole", [False, True])
def test_a_full_disk_stops_decoding_in_words_and_room_lets_it_go_on(root: Path, tmp_path: Path, whole: bool) -> None:
    for index in range(100):
        shutil.copyfile(root / "train/cat/0.png", root / f"train/cat/1{index}.png")
    (cache := tmp_path / "cache").mkdir()
    code = f"""
import subprocess
import kdq.data.folder as folder

folder.KEPT_EVERY = 8
read = lambda: folder.image_folder({str(root)!r}, 48, 3, {str(cache)!r}, whole={whole}).train_digest
try:
    read()
except OSError as error:
    print(error.strerror)
subprocess.run(["mount", "-o", "remount,size=4m", {str(cache)!r}], check=True)
print(read())
"""
    mounted = 'mount -t tmpfs -o size=256k tmpfs "$1" && shift && exec "$@"'
    inside = ["unshare", "-rm", "sh", "-c", mounted, "sh", str(cache)]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("no small disk can be mounted here")
    ended = subprocess.run([*inside, sys.executable, "-c", code], capture_output=True, text=True)
    expected = image_folder(str(root), 48, 3, str(tmp_path / "other"), whole=whole).train_digest
    assert ended.stdout.split("\n")[:2] == ["No space left on device", expected], ended


def test_images_of_16_bits_are_not_cut_off_at_8(root: Path, tmp_path: Path) -> None:
    deep = root / "train/dog/2.png"
    Image.fromarray(np.linspace(0, 65535, 36, dtype=np.uint16).reshape(6, 6)).save(deep)
    with pytest.raises(KdqError, match=f"{deep} has more than 8 bits a channel"):
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))


def test_missing_and_surplus_folders_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(KdqError, match=r"no folder .*nowhere/train"):
        class_names(tmp_path / "nowhere")
    (root / "test" / "bird").mkdir()
    with pytest.raises(KdqError, match="class folders that train/ lacks: bird"):
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))
    (root / "test" / "bird").rmdir()
    shutil.rmtree(root / "test" / "dog")
    with pytest.raises(KdqError, match="dog holds no image"):
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))


def test_a_thread_of_pixels_is_cropped_before_it_is_scaled(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thin = np.zeros((6000, 1, 3), np.uint8)
    thin[2999:3001] = 200  # the centre, which the crop keeps
    Image.fromarray(thin).save(root / "test/cat/0.png")
    sizes, resize = [], Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        sizes.append(size[0] * size[1])
        return resize(self, size, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    found = image_folder(str(root), 64, 3, str(tmp_path / "cache"))
    assert max(sizes) <= 16 * 64 * 64
    assert found.test_images[0].float().mean() > 150


def test_a_photograph_is_read_upright(root: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(root / "test/cat/0.png", exif=exif)
    found = image_folder(str(root), 6, 3, str(tmp_path / "cache"))
    np.testing.assert_array_equal(found.test_images[0].numpy(), np.rot90(pixels, -1))


@pytest.mark.parametrize("kind", ["pipe", "dangling", "circular"])
def test_what_is_no_file_is_named_and_never_opened(root: Path, tmp_path: Path, kind: str) -> None:
    bad = root / "train/dog/9.png"
    if kind == "pipe":
        os.mkfifo(bad)
    else:
        bad.symlink_to("nowhere.png" if kind == "dangling" else bad.name)
    with pytest.raises(KdqError, match=str(bad)):
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))


def test_links_that_lead_back_are_refused_at_once(root: Path, tmp_path: Path) -> None:
    """Two of them in one folder have more than 2^40 paths."""
    for name in ("again", "and_again"):
        (root / "train/dog" / name).symlink_to(root / "train/dog")
    with pytest.raises(KdqError, match=r"again is a link to what .*dog holds"):
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))


@pytest.mark.parametrize("linked", ["train", "train/dog", "train/dog/more", "train/dog/0.png"])
def test_images_behind_links_are_read_as_the_others(linked: str, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "train/cat", root / "train/dog/more")
    before = image_folder(str(root), 6, 3, str(tmp_path / "cache"))
    (root / linked).rename(tmp_path / "elsewhere")
    (root / linked).symlink_to(tmp_path / "elsewhere")
    after = image_folder(str(root), 6, 3, str(tmp_path / "other"))
    assert len(after.train_labels) == 9
    assert after.train_digest == before.train_digest


def test_any_name_of_the_file_system_is_read(root: Path, tmp_path: Path) -> None:
    odd = os.fsencode(root / "train/dog") + b"/\xff\xfe.png"
    shutil.copyfile(root / "train/dog/0.png", odd)
    assert len(image_folder(str(root), 6, 3, str(tmp_path / "cache")).train_labels) == 7
    Path(os.fsdecode(odd)).write_bytes(b"none")
    with pytest.raises(KdqError, match="xff") as caught:
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))
    str(caught.value).encode()


#: Decodes the file in a process of its own and prints by how many bytes its memory grew at most.
PEAK = """
import sys
from pathlib import Path
from kdq.data.folder import decode_image
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
decode_image(Path(sys.argv[1]), 64, 3)
print(1024 * (peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is looked up in /proc")
def test_an_image_fills_memory_once(tmp_path: Path) -> None:
    pixels = 5000 * 5000
    Image.new("RGB", (5000, 5000)).save(tmp_path / "large.png")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large.png")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.6 * 4 * pixels  # Pillow holds four bytes a pixel


def test_a_side_of_a_million_pixels_is_refused_before_it_is_decoded(root: Path, tmp_path: Path) -> None:
    Image.new("1", (1, 10**6)).save(root / "train/dog/2.png")
    with pytest.raises(KdqError, match=str(root / "train/dog/2.png")):
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))


def test_no_program_is_run_for_what_a_file_holds(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript, whatever its file is called, to Ghostscript."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    bad = root / "train/dog/2.png"
    bad.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(KdqError, match=f"cannot read the image {bad}"):
        image_folder(str(root), 6, 3, str(tmp_path / "cache"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"])
def test_damaged_images_are_named_or_have_the_right_shape(suffix: str, tmp_path: Path) -> None:
    random, file = np.random.default_rng(0), tmp_path / f"image{suffix}"
    Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    whole, refused = file.read_bytes(), list[str]()
    for turn in range(100):
        content = bytearray(whole)
        at, to = sorted(int(i) for i in random.integers(0, 80 if turn % 2 else len(whole), 2))
        match turn % 4:
            case 0:
                content[at] = int(random.integers(256))
            case 1:
                content[at : at + 4] = b"\xff\xff\xff\x7f"  # where a size may be
            case 2:
                del content[at:]
            case _:
                content[at:at] = content[at:to]
        file.write_bytes(content)
        try:
            assert decode_image(file, 16, 3).shape == (16, 16, 3)
        except KdqError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(str(file) in line and "\n" not in line for line in refused)


def test_one_class_is_refused(root: Path) -> None:
    shutil.rmtree(root / "train/dog")
    with pytest.raises(KdqError, match="1 class folders"):
        class_names(root)


def test_a_limit_decodes_what_it_leaves_and_changes_no_image(tmp_path: Path) -> None:
    """The split of a limited set has the images that it has of the whole one."""
    root = tmp_path / "images"
    for part, count in (("train", 40), ("test", 2)):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (4, 4), (index, 100, 7)).save(root / part / name / f"{index:02}.png")
    asked = {"val_fraction": 0.1, "seed": 3, "train_limit": 10}
    whole, limited = (image_folder(str(root), 4, 3, str(tmp_path / "cache"), s) for s in (None, asked))
    found = split(80, 0.1, 3, 10)
    for rows in (found.train, found.val):
        assert torch.equal(whole.train_images[rows], limited.train_images[rows])
    assert int((limited.train_images.flatten(1).amax(1) > 0).sum()) == 18
    assert torch.equal(whole.train_labels, limited.train_labels)


def test_cifar_is_read_from_class_folders_where_they_are(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "cifar10" / part / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (32, 32), (index, 100, 7)).save(tmp_path / "cifar10" / part / name / f"{index}.png")
    for root in (tmp_path, tmp_path / "cifar10"):
        found = cifar10(str(root), str(tmp_path / "cache"))
        assert found.classes == ("cat", "dog")
        assert found.train_images.shape == (6, 32, 32, 3)
