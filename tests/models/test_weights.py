"""Weights from elsewhere: files in the published formats, and files that must be refused."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdq.models import resnet18, resnet50
from kdq.models.weights import load_weights, locate, read_state_dict
from kdq.utils.errors import KdqError


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_published_resnet50_checkpoint_loads_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = resnet50(10), resnet50(10)
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    load_weights(target, tmp_path / "pytorch_model.bin")
    assert _same(source, target)


@pytest.mark.parametrize("wrap", ["plain", "safetensors", "state_dict", "module", "no_counter"])
def test_formats(tmp_path: Path, wrap: str) -> None:
    torch.manual_seed(0)
    source, target = resnet18(10), resnet18(10)
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pth")
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "state_dict":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif wrap == "module":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    elif wrap == "no_counter":  # checkpoints from before BatchNorm counted its steps
        torch.save({name: value for name, value in state.items() if "num_batches" not in name}, path)
    else:
        torch.save(state, path)
    load_weights(target, path)
    assert _same(source, target)


def test_misfits_are_listed(tmp_path: Path) -> None:
    state = resnet18(100).state_dict()
    torch.save(state, tmp_path / "classes.pth")
    with pytest.raises(
        KdqError, match=r"wrong shape: fc.weight \(100, 512\) instead of \(10, 512\).*number of classes"
    ):
        load_weights(resnet18(10), tmp_path / "classes.pth")
    state = resnet18(10).state_dict()
    state["extra"] = state.pop("conv1.weight")
    torch.save(state, tmp_path / "names.pth")
    with pytest.raises(KdqError, match=r"missing: conv1.weight; unexpected: extra"):
        load_weights(resnet18(10), tmp_path / "names.pth")
    state["two\nlines"] = torch.zeros(0)
    state["bn1.num_batches_tracked"] = torch.zeros(3)  # no classifier: it has no classes
    torch.save(state, tmp_path / "lines.pth")
    with pytest.raises(KdqError, match=r"unexpected: extra, two lines; wrong shape: bn1.num_batches_tracked"):
        load_weights(resnet18(10), tmp_path / "lines.pth", new_head=True)
    for value in (torch.eye(3).to_sparse(), torch.eye(3, device="meta"), torch.zeros(3, dtype=torch.complex64)):
        torch.save({"fc.weight": value}, tmp_path / "kinds.pth")
        with pytest.raises(KdqError, match=r"does not hold a state dict"):
            read_state_dict(tmp_path / "kinds.pth")


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("pwned"),))  # type: ignore[return-value]


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": _Attack()}, tmp_path / "evil.pth")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(_Attack()))
    for name in ("evil.pth", "evil.bin"):
        with pytest.raises(KdqError, match="cannot read weights"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated_and_foreign_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    state = {"a": torch.randn(50, 50)}
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x00" * 100, b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(KdqError, match=f"cannot read weights from {path}"):
            read_state_dict(path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(KdqError, match="does not hold a state dict"):
        read_state_dict(tmp_path / "list.pth")


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KdqError, match="no weights file at"):
        locate(str(tmp_path / "nothing.pth"))
    with pytest.raises(KdqError, match="is not hf:owner/name"):
        locate("hf:justname")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KdqError, match=r"cannot fetch model.safetensors of someone/net .*give its path"):
        locate("hf:someone/net")


def test_a_hub_repository_in_the_local_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repo = tmp_path / "models--edadaltocg--resnet50_cifar10"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    torch.save(resnet18(10).state_dict(), repo / "snapshots" / commit / "pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = locate("hf:edadaltocg/resnet50_cifar10:pytorch_model.bin")
    load_weights(resnet18(10), found)
