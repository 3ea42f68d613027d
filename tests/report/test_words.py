"""Sentences: what they say of known numbers, and what they refuse to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kdq.records.rows import Row
from kdq.report.cells import by_seed, named
from kdq.report.words import Statement, statements, without_repeats


def _said(rows: list[Row]) -> list[Statement]:
    return statements(by_seed(named(rows)))


def _text(said: list[Statement], topic: str, method: str = "") -> str:
    (found,) = [statement.text for statement in said if (statement.topic, statement.method) == (topic, method)]
    return found


def _pair(row: Callable[..., Row], student: list[float], teacher: list[float], **changes: object) -> list[Row]:
    """One width, one accuracy per seed; the teacher's file is four times as large, and there is no float file."""
    common = {"float_bytes": 0, "bits": 2} | changes
    rows = [row(method="vkd", seed=seed, top1=top1, size_bytes=100_000, **common) for seed, top1 in enumerate(student)]
    return rows + [
        row(method="teacher", arch="big", seed=seed, top1=top1, size_bytes=400_000, **common)
        for seed, top1 in enumerate(teacher)
    ]


def test_beyond_noise(row: Callable[..., Row]) -> None:
    said = _said(_pair(row, [80.0, 80.2, 80.4], [90.0, 90.2, 90.4]))
    # By SciPy: -10 points, 95 % interval -10.45 to -9.55.
    wanted = "trails at 2 bits (−10.00, −10.45 to −9.55)"
    assert wanted in _text(said, "bits", "vkd")
    assert "At equal bits: no at 2 bits (−10.00, −10.45 to −9.55)" in _text(said, "answer")
    assert "n = 3 and 3 seeds" in _text(said, "answer")


def test_within_noise(row: Callable[..., Row]) -> None:
    said = _said(_pair(row, [80.0, 90.0], [81.0, 90.0]))
    assert "within seed noise at 2 bits (−0.50, " in _text(said, "bits", "vkd")
    assert "undecided within seed noise at 2 bits" in _text(said, "answer")
    assert "not more than seed noise" in _text(said, "drop")


def test_one_seed(row: Callable[..., Row]) -> None:
    said = _said(_pair(row, [92.0], [90.0]))
    assert "At equal bits: the student leads, untested, at 2 bits (+2.00)." in _text(said, "answer")
    assert "One seed each: nothing can be said about seed noise." in _text(said, "answer")
    assert "(one seed: nothing can be said about noise)" in _text(said, "drop")
    assert "p =" not in " ".join(statement.text for statement in said)


def test_equal_accuracies_without_spread(row: Callable[..., Row]) -> None:
    said = _said(_pair(row, [90.0, 90.0], [90.0, 90.0]))
    assert "equal at 2 bits (0.00)" in _text(said, "bits", "vkd")


def test_no_size_is_shared(row: Callable[..., Row]) -> None:
    said = _said(_pair(row, [80.0], [90.0]))
    assert "no size is there for both: the student has 100 kB to 100 kB, the teacher 400 kB to 400 kB." in _text(
        said, "bytes", "vkd"
    )
    assert "At equal bytes: no size is there for both." in _text(said, "answer")
    assert "cross" not in " ".join(statement.text for statement in said)


def test_crossover_and_who_is_alone(row: Callable[..., Row]) -> None:
    rows = _pair(row, [80.0], [70.0], bits=2)
    rows.append(row(method="vkd", bits=8, top1=84.0, size_bytes=1_600_000, float_bytes=0))
    rows.append(row(method="teacher", arch="big", bits=8, top1=94.0, size_bytes=6_400_000, float_bytes=0))
    text = _text(_said(rows), "bytes", "vkd")
    # At 400 kB the student has 82, the teacher 70; at 1.6 MB 84 and 82; beyond, only the teacher.
    assert "leads, untested, at 400 kB (+12.00), 1.6 MB (+2.00)" in text
    assert "The mean curves do not cross where both exist." in text
    assert "Below 400 kB only the student has files, from 100 kB with 80.00 %." in text


def test_what_is_missing_is_said(row: Callable[..., Row]) -> None:
    teacher, student = _pair(row, [80.0], [90.0])[1:], _pair(row, [80.0], [90.0])[:1]
    assert "no row of a quantized teacher" in _text(_said(student), "answer")
    assert "no row of a distilled student" in _text(_said(teacher), "answer")
    control = [row(method="baseline", bits=2, top1=79.0)]
    assert "no row of a distilled student" in _text(_said(teacher + control), "answer")
    assert "Without baseline rows" in _text(_said(teacher + student), "answer")
    assert "Without baseline rows" not in _text(_said(teacher + student + control), "answer")


def test_answers_without_numbers_are_given_once_for_a_data_set(row: Callable[..., Row]) -> None:
    rows = [
        row(method="teacher", arch="big", data=data, quantizer=quantizer)
        for data in ("digits", "cifar10")
        for quantizer in ("gpfq", "rtn")
    ]
    told = [(found.data, found.quantizer, found.topic) for found in without_repeats(_said(rows))]
    drops = [(data, quantizer, "drop") for data in ("cifar10", "digits") for quantizer in ("gpfq", "rtn")]
    assert sorted(told) == sorted([("cifar10", "gpfq", "answer"), ("digits", "gpfq", "answer"), *drops])


def test_the_control(row: Callable[..., Row]) -> None:
    rows = [row(method="vkd", top1=90.0, top1_float=93.0), row(method="baseline", top1=88.0, top1_float=92.5)]
    text = _text(_said(rows), "control", "vkd")
    assert "leads, untested, at 4 bits (+2.00), float (+0.50)" in text
    assert "cross-entropy alone" in text
    rows.append(row(method="teacher", top1=95.0))
    assert "What distillation adds at 4 bits, over the same network without it: vkd (+2.00)." in _text(
        _said(rows), "answer"
    )


def test_no_needs_every_student_to_trail(row: Callable[..., Row]) -> None:
    """A student with wide noise may have the lower mean and still not be beaten."""
    rows = _pair(row, [80.0, 80.2, 80.4], [82.0, 82.2, 82.4])
    assert "At equal bits: no at 2 bits (−2.00, " in _text(_said(rows), "answer")
    common = {"method": "dkd", "bits": 2, "float_bytes": 0}
    noisy = [row(seed=seed, top1=top1, **common) for seed, top1 in enumerate([70.0, 80.0, 88.0])]
    assert "At equal bits: undecided within seed noise at 2 bits (dkd −2.87, " in _text(_said(rows + noisy), "answer")
    better = [row(seed=seed, top1=83.0 + seed / 10, **common | {"method": "dml"}) for seed in range(3)]
    assert "At equal bits: yes at 2 bits (dml +0.90, " in _text(_said(rows + noisy + better), "answer")


def test_different_widths_are_not_compared(row: Callable[..., Row]) -> None:
    rows = [row(method="vkd", bits=2, float_bytes=0), row(method="teacher", bits=3, float_bytes=0)]
    assert "At equal bits: no width is there for both." in _text(_said(rows), "answer")


def test_nothing_from_nothing() -> None:
    assert _said([]) == []


def test_a_size_is_compared_once(row: Callable[..., Row]) -> None:
    """A float file and one of 32 bits, half a percent apart."""
    sizes = {2: 100_000, 32: 400_000}
    rows = [
        row(method=m, arch=m, bits=b, size_bytes=s, float_bytes=398_000)
        for m in ("vkd", "teacher")
        for b, s in sizes.items()
    ]
    text = _text(_said(rows), "bytes", "vkd")
    assert text.count("398 kB") == 1
    assert "400 kB" not in text


def test_models_of_one_method_are_told_apart(row: Callable[..., Row]) -> None:
    rows = [row(method="baseline", arch=arch, top1_float=95.0, top1=top1) for arch, top1 in (("a", 94.0), ("b", 93.0))]
    assert "baseline (a) with 1.00, then baseline (b) with 2.00" in _text(_said(rows), "drop")


def test_how_fast_the_models_are(row: Callable[..., Row]) -> None:
    rows = _pair(row, [90.0, 90.2], [91.0, 91.2])
    rows = [replace(r, latency_ms_torch=3.0 if r.role == "teacher" else 1.0) for r in rows]
    assert "Latency (ms, PyTorch float32, batch 1): teacher (big) 3, vkd (resnet20) 1." in _text(_said(rows), "answer")
    exported = [replace(r, latency_ms_onnx_int8=r.latency_ms_torch / 4, top1_onnx_int8=r.top1) for r in rows]
    assert "ONNX Runtime INT8, batch 1): teacher (big) 0.75, vkd" in _text(_said(exported), "answer")
    assert "Latency" not in _text(_said(exported[:2]), "answer")  # of one model only
