"""CRD: its loss and its bank against the definitions in float64, and trainings with a stranger's loader and kdq's."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from kdq.distill import CRD, Terms, TrainConfig
from kdq.distill.feature_losses import contrast_loss, contrast_scores
from kdq.distill.progress import TrainingProgress
from kdq.utils.errors import KdqError
from tests.distill.small import COUNT, QUIET, Indexed, in_two_processes, network


def make(**options: Any) -> CRD:
    return CRD(network(1), teacher=network(2, width=0.5), num_classes=4, dim=6, **{"negatives": 20, **options})


def test_the_loss_is_the_likelihood_of_which_are_pairs() -> None:
    """A loop over the posterior of Tian et al., equation 18: N noise pairs for each true one, even over images."""
    rng = np.random.default_rng(0)
    anchors, positives, negatives = (rng.normal(size=(n, 6)) for n in (5, 5, 9))
    tau, images, norm = 0.5, 30, 70.0
    expected = 0.0
    for anchor, positive in zip(anchors, positives, strict=True):
        pairs = [(positive, True), *((negative, False) for negative in negatives)]
        for other, is_pair in pairs:
            p = np.exp(anchor @ other / tau) / norm
            h = p / (p + len(negatives) / images)
            expected -= np.log(h if is_pair else 1 - h) / len(anchors)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (anchors, positives, negatives)]
    found = contrast_loss(contrast_scores(*tensors, tau), torch.tensor(norm, dtype=torch.float64).log(), images)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert tensors[0].grad is not None
    assert tensors[1].grad is tensors[2].grad is None


def test_with_all_negatives_the_best_scores_are_a_softmax_over_the_bank() -> None:
    """Noise-contrastive estimation is least where exp(score) / norm are the probabilities by which pairs are drawn; its
    gradient there is zero, with the constant that makes an explicit softmax over the bank."""
    torch.manual_seed(0)
    images = 7
    bank_scores = torch.randn(images, dtype=torch.float64, requires_grad=True)
    softmax = bank_scores.detach().softmax(0)
    log_norm = bank_scores.detach().logsumexp(0)
    parts = [
        contrast_loss(torch.cat([bank_scores[i : i + 1], bank_scores])[None], log_norm, images) for i in range(images)
    ]
    (slope,) = torch.autograd.grad((torch.stack(parts) * softmax).sum(), bank_scores)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def test_two_batches_against_their_definition() -> None:
    """The pairs, the norms of the first batch, and what the bank remembers."""
    data, module = Indexed(), make(momentum=0.25, tau=0.2)
    module.connect(data.images[:2]).remember(COUNT)
    bank, norms = module.bank.double().numpy().copy(), None
    (embed,) = module.projectors
    taken: list[Tensor] = []
    for model in (module.student.network, module.teacher.network):
        model.fc.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach().double()))  # type: ignore[union-attr, operator]
    for step in range(2):
        indices = torch.arange(12) * 3 + step
        moment = TrainingProgress(step=step, indices=indices)
        terms, _ = module.losses(data.images[indices], data.labels[indices], moment)
        mine = []
        for layer, features in zip(embed, taken[-2:], strict=True):  # type: ignore[arg-type]
            x = features.numpy() @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
            mine.append(x / np.linalg.norm(x, axis=1, keepdims=True))
        others = moment.random(module.seed).choice(COUNT, 20, replace=False)
        assert len(set(others)) == 20
        expected, found_norms = 0.0, []
        for side in (0, 1):
            own, theirs = mine[side], bank[1 - side]
            scores = np.array([[a @ theirs[i], *(theirs[others] @ a)] for a, i in zip(own, indices, strict=True)]) / 0.2
            found_norms.append(np.exp(scores).mean() * COUNT)
            p = np.exp(scores) / (norms or found_norms)[side]
            h = p / (p + 20 / COUNT)
            expected += float(-(np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)).mean())
        norms = norms or found_norms
        assert float(terms["features"].detach()) == pytest.approx(0.8 * expected, rel=1e-5)
        for side in (0, 1):
            new = 0.25 * bank[side][indices] + 0.75 * mine[side]
            bank[side][indices] = new / np.linalg.norm(new, axis=1, keepdims=True)
    np.testing.assert_allclose(module.bank.numpy(), bank, atol=1e-5)


@pytest.mark.parametrize("value", [0, 2.5, math.inf, True])
def test_what_is_no_count_is_refused(value: float) -> None:
    for option in ("negatives", "dim"):
        with pytest.raises(KdqError, match=f"method.{option}={value} must be a"):
            CRD(network(1), teacher=network(2), num_classes=4, **{option: value})


def test_a_stranger_s_loader() -> None:
    module = make(config=TrainConfig(lr=0.01))
    L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False).fit(module, DataLoader(Indexed(), 16))
    assert torch.isfinite(module.log_norms).all()
    more = DataLoader(ConcatDataset([Indexed(), Indexed()]), 16)  # twice as many, whose indices repeat
    L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False).fit(module, more)
    assert module.bank.shape == (2, 2 * COUNT, 6)
    assert Terms(network(1), network(2), num_classes=4, terms={"crd": {"dim": 6}, "vkd": {}}).indexed
    plain = DataLoader([(image, label) for image, label, _ in Indexed()], 16)  # type: ignore[arg-type, var-annotated, attr-defined]
    with pytest.raises(KdqError, match=r"give a loader of batches \(images, labels, indices\)"):
        L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False).fit(make(), plain)


def test_a_checkpoint_s_numbers_ask_for_no_more_than_it_holds(tmp_path: Path) -> None:
    module, loader, path = make(), DataLoader(Indexed(), 16), tmp_path / "x.ckpt"
    trainer = L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, loader)
    trainer.save_checkpoint(path)
    huge, few = torch.zeros(1).expand(2, 10**12, 6), torch.zeros(2, 0, 3)

    def damage(change: Any) -> None:
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "damaged.ckpt")
        with pytest.raises(KdqError, match="the checkpoint does not fit: "):
            CRD.load_from_checkpoint(tmp_path / "damaged.ckpt", teacher=network(2, width=0.5))

    damage(lambda c: c["state_dict"].update(bank=huge))
    damage(lambda c: c["state_dict"].update(bank=few))
    damage(lambda c: c["state_dict"].pop("bank"))
    damage(lambda c: c["layers"]["student"].update({"fc:input": [10**12]}))
    damage(lambda c: c["hyper_parameters"].update(dim=10**9))
    more = DataLoader(ConcatDataset([Indexed(), Indexed()]), 16)
    with pytest.raises(KdqError, match=r"bank must be \(2, 96, 6\), and is \(2, 48, 6\)"):
        L.Trainer(**QUIET, max_epochs=2, enable_checkpointing=False).fit(make(), more, ckpt_path=path)


def _trained(rank: int, folder: str) -> None:
    module = make(config=TrainConfig(lr=0.01))
    trainer = L.Trainer(**QUIET, max_epochs=1, devices=2, strategy="ddp", enable_checkpointing=False)
    trainer.fit(module, DataLoader(Indexed(), 12))
    torch.save((module.bank, module.log_norms), f"{folder}/{rank}.pt")


def test_two_processes_have_one_bank(tmp_path: Path) -> None:
    in_two_processes(_trained, str(tmp_path))
    (bank, norms), (other, other_norms) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(bank, other)
    assert torch.equal(norms, other_norms)
    start = make().remember(COUNT).bank
    assert (bank != start).any(2).all()  # each image was seen by one of them
