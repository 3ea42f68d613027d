"""Sentences: what they say of known numbers, and what they refuse to say."""

from collections.abc import Callable
from dataclasses import replace

from kdq.records.rows import Row
from kdq.report.cells import named
from kdq.report.words import COLUMNS, Answer, answers


def _said(rows: list[Row]) -> Answer:
    (found,) = answers(named(rows))
    return found


def _cells(rows: list[Row], kind: str, comparison: str) -> dict[str, str]:
    (line,) = [line for line in _said(rows).lines if (kind in line.kind and line.cells[0] == comparison)]
    return dict(zip(COLUMNS, line.cells, strict=True))


def _pair(row: Callable[..., Row], student: list[float], teacher: list[float], **changes: object) -> list[Row]:
    """One width, one accuracy per seed, the same size for both; the float files are out of the way."""
    common = {"float_bytes": 0, "bits": 2, "size_bytes": 100_000} | changes
    rows = [row(method="vkd", seed=seed, top1=top1, **common) for seed, top1 in enumerate(student)]
    return rows + [
        row(method="teacher", arch="big", seed=seed, top1=top1, **common) for seed, top1 in enumerate(teacher)
    ]


def test_beyond_noise(row: Callable[..., Row]) -> None:
    rows = _pair(row, [80.0, 80.2, 80.4], [90.0, 90.2, 90.4])
    # By SciPy: 10 points, 95 % interval 9.55 to 10.45.
    assert _said(rows).headline == (
        "digits at equal bytes (gpfq, 3 seeds): the teacher beats vkd at 100 kB (by 10.0 points, 95 % interval 9.5 to "
        "10.5)."
    )
    assert _cells(rows, "bits", "vkd vs teacher") == {
        "comparison": "vkd vs teacher",
        "higher at": "–",
        "undecided at": "float",
        "lower at": "2 bits",
        "at the smallest": "−10.00 (−10.45 to −9.55) at 2 bits",
        "seeds": "3 + 3",
    }


def test_within_noise(row: Callable[..., Row]) -> None:
    rows = _pair(row, [80.0, 90.0], [81.0, 90.0])
    assert (
        "no road wins beyond seed noise; at 100 kB undecided (the teacher ahead by 0.5 points)" in _said(rows).headline
    )
    assert _cells(rows, "bytes", "vkd vs teacher")["undecided at"] == "100 kB"


def test_one_seed(row: Callable[..., Row]) -> None:
    rows = _pair(row, [92.0], [90.0])
    assert "(gpfq, 1 seed): vkd is ahead of the teacher at 100 kB (by 2.0 points, untested)." in _said(rows).headline
    cells = _cells(rows, "bytes", "vkd vs teacher")
    assert (cells["higher at"], cells["at the smallest"], cells["seeds"]) == (
        "100 kB",
        "+2.00 at 100 kB",
        "1 + 1, untested",
    )


def test_what_no_test_could_show_is_not_called_noise(row: Callable[..., Row]) -> None:
    rows = _pair(row, [89.9, 90.0, 90.1], [80.0])
    said = "(gpfq, 1 to 3 seeds): vkd is ahead of the teacher at 100 kB (by 10.0 points, untested)."
    assert said in _said(rows).headline


def test_how_many_seeds_a_tuned_network_shares_is_said(row: Callable[..., Row]) -> None:
    common = {"bits": 2, "size_bytes": 100_000, "float_bytes": 0}
    rows = [row(seed=seed, top1=top1, **common) for seed, top1 in enumerate((80.0, 95.0))]
    rows.append(row(top1=81.0, tune="qad", **common))
    said = "vkd + qad is ahead of vkd at 100 kB (by 1.0 points, untested, 1 seed of both)"
    assert said in _said(rows).headline
    assert _cells(rows, "tuned", "vkd + qad vs vkd")["seeds"] == "1 of both, untested"


def test_equal_accuracies_are_undecided(row: Callable[..., Row]) -> None:
    rows = _pair(row, [90.0, 90.0], [90.0, 90.0])
    assert _cells(rows, "bits", "vkd vs teacher")["undecided at"] == "2 bits to float"
    assert _said(rows).headline.endswith("at 100 kB undecided (means differ by 0.0 points).")  # nobody is ahead


def test_regions_and_who_is_alone(row: Callable[..., Row]) -> None:
    """The student is ahead at 400 kB, where the teacher begins, and the teacher at 1.6 MB, where the student ends."""
    tops = {
        "vkd": {100_000: 70.0, 400_000: 80.0, 1_600_000: 82.0},
        "teacher": {400_000: 75.0, 1_600_000: 90.0, 6_400_000: 91.0},
    }
    rows = [
        row(method=method, bits=bits, top1=top1, size_bytes=size, float_bytes=0)
        for method, sizes in tops.items()
        for bits, (size, top1) in zip((2, 4, 8), sizes.items(), strict=True)
    ]
    assert _said(rows).headline == (
        "digits at equal bytes (gpfq, 1 seed): vkd is ahead of the teacher at 400 kB (by 5.0 points, untested); "
        "the teacher is ahead of vkd at 1.6 MB (by 8.0 points, untested); "
        "below 400 kB only vkd has files (70.0 % at 100 kB)."
    )
    cells = _cells(rows, "bytes", "vkd vs teacher")
    assert (cells["higher at"], cells["lower at"]) == ("400 kB", "1.6 MB")


def _files(row: Callable[..., Row], tops: dict[tuple[str, str], dict[int, float]]) -> list[Row]:
    """Rows of 2, 4 and 8 bits by method and tuning, each with its bytes and top-1."""
    return [
        row(method=method, tune=tune, bits=bits, top1=top1, size_bytes=size, float_bytes=0)
        for (method, tune), sizes in tops.items()
        for bits, (size, top1) in zip((2, 4, 8), sizes.items(), strict=False)
    ]


def test_a_region_ends_where_its_models_do(row: Callable[..., Row]) -> None:
    """Tuned networks have files up to 200 kB, the student from 100 kB to 1 MB, the teacher from 400 kB on."""
    tops = {
        ("vkd", ""): {100_000: 70.0, 200_000: 75.0, 1_000_000: 80.0},
        ("vkd", "qad"): {100_000: 74.0, 200_000: 76.0},
        ("teacher", ""): {400_000: 85.0, 1_000_000: 90.0},
    }
    rows = _files(row, tops)
    headline = _said(rows).headline
    assert "vkd + qad is ahead of vkd from 100 to 200 kB (by 4.0 points at 100 kB" in headline
    assert "the teacher is ahead of vkd from 400 kB to 1 MB (by" in headline
    rows = [replace(r, top1=74.5) if r.size_bytes == 200_000 and r.tune else r for r in rows]
    rows = [replace(r, size_bytes=300_000) if r.size_bytes == 200_000 and not r.tune else r for r in rows]
    rows += [replace(rows[-1], bits=16, size_bytes=2_000_000)]
    rows = [r for r in rows if not (r.method == "vkd" and r.size_bytes == 1_000_000)]
    headline = _said(rows).headline  # from 300 kB, the student's end, to 400, the teacher's beginning, is nobody's
    assert "from 200 to 300 kB only vkd has files" not in headline
    assert "at 300 kB only vkd has files (75.0 % at 300 kB)" in headline


def test_a_smaller_file_that_is_better_leads(row: Callable[..., Row]) -> None:
    """The tuned teacher has one file, of fewer bytes than the student's next."""
    tops = {
        ("vkd", ""): {100_000: 70.0, 310_000: 75.0},
        ("vkd", "qad"): {100_000: 74.0},
        ("teacher", ""): {300_000: 65.0, 400_000: 77.0, 500_000: 80.0},
        ("teacher", "qad"): {300_000: 78.0},
    }
    rows = _files(row, tops)
    headline = _said(rows).headline
    assert "vkd + qad is ahead of vkd at 100 kB (by 4.0 points" in headline
    assert "teacher + qad is ahead of vkd from 300 to 310 kB (by 3.1 points at 300 kB" in headline
    assert "teacher + qad is ahead of the teacher at 400 kB (by 1.0 points" in headline


def test_a_smaller_tuned_file_leads_where_its_own_seeds_are_better(row: Callable[..., Row]) -> None:
    """One seed of three is tuned: compared with its own at 4 bits, which is not the mean of all three."""
    tops = {0: (70.0, 75.0), 1: (68.0, 73.0), 2: (66.0, 71.0)}
    rows = [
        row(seed=seed, bits=bits, top1=top1, size_bytes=50_000 * bits, float_bytes=0)
        for seed, both in tops.items()
        for bits, top1 in zip((2, 4), both, strict=True)
    ]
    tuned = {"tune": "qad", "bits": 2, "size_bytes": 100_000, "float_bytes": 0}
    better, worse = row(seed=2, top1=72.0, **tuned), row(seed=0, top1=74.0, **tuned)
    assert "vkd + qad is ahead of vkd from 100 to 200 kB (by 6.0 points at 100 kB" in _said([*rows, better]).headline
    assert "vkd + qad is ahead of vkd at 100 kB (by 4.0 points, untested" in _said([*rows, worse]).headline
    assert "200 kB" not in _said([*rows, worse]).headline


def test_places_in_a_row_are_one_region(row: Callable[..., Row]) -> None:
    rows = [
        r
        for bits, size in ((2, 100_000), (3, 150_000), (4, 200_000))
        for r in _pair(row, [80.0, 80.2, 80.4], [79.0, 79.2, 79.4], bits=bits, size_bytes=size)
    ]
    assert "vkd beats the teacher from 100 to 200 kB (by 1.0 points at 100 kB, " in _said(rows).headline
    assert _cells(rows, "bits", "vkd vs teacher")["higher at"] == "2 to 4 bits"


def test_no_size_is_shared(row: Callable[..., Row]) -> None:
    rows = _pair(row, [80.0], [90.0])
    rows = [replace(r, size_bytes=400_000) if r.role == "teacher" else r for r in rows]
    assert "no size is there for two roads; below 400 kB only vkd has files (80.0 % at 100 kB)." in _said(rows).headline
    assert _cells(rows, "bytes", "vkd vs teacher")["at the smallest"] == "nothing in common"


def test_what_is_missing_is_said(row: Callable[..., Row]) -> None:
    student, teacher = _pair(row, [80.0], [90.0])
    assert "for no row quantized with gpfq is of “quantize the teacher”" in _said([student]).headline
    road = "“train or distil a student, then quantize it”"
    assert f"for no row quantized with gpfq is of {road}" in _said([teacher]).headline
    both = [replace(student, quantizer="rtn"), teacher]  # there are rows of either road, but of no quantizer's
    assert f"for no row quantized with gpfq is of {road}" in _said(both).headline


def test_a_choice_on_images_that_taught_the_teacher_is_named(row: Callable[..., Row]) -> None:
    rows = _pair(row, [90.0], [91.0])
    rows += [replace(r, method="dkd", val_top1_float=100.0) for r in rows if r.method == "vkd"]
    outside = [replace(r, epochs=0) if r.role == "teacher" else replace(r, epochs=3) for r in rows]
    inside = [replace(r, epochs=3) for r in rows]
    assert "dkd was chosen among dkd, vkd on images that the teacher" in _said(outside).headline
    alone = [r for r in outside if r.method != "dkd"]
    assert not any("chosen" in _said(some).headline for some in (rows, inside, alone))
    tuned = [replace(r, tune=tune, val_top1=50.0) for r in alone if r.role == "teacher" for tune in ("qad", "qat")]
    assert "teacher + qad was chosen among teacher + qad, teacher + qat on images" in _said([*alone, *tuned]).headline


def test_what_distillation_is_worth(row: Callable[..., Row]) -> None:
    rows = [*_pair(row, [90.0], [91.0]), row(method="baseline", bits=2, top1=88.0, float_bytes=0)]
    assert _said(rows).headline.endswith("distillation itself is worth +2.0 points over baseline at 2 bits (untested).")
    assert _cells(rows, "top-1 at equal bits", "vkd vs baseline")["higher at"] == "2 bits"


def test_what_made_the_numbers(row: Callable[..., Row]) -> None:
    rows = _pair(row, [80.0], [90.0], params=12_345, calibration_images=64)
    assert "teacher big (12,345 parameters, training not recorded); student resnet20 (" in _said(rows).made[0]
    rows = [replace(r, epochs=40, recipe="one_cycle, lr 0.1, batches of 64") for r in rows]
    wanted = "(12,345 parameters, 40 epochs, one_cycle, lr 0.1, batches of 64); quantized with gpfq (64 images); 1 seed"
    assert wanted in _said(rows).made[0]
    assert "weights from a file" in _said([replace(r, epochs=0) for r in rows]).made[0]


def test_the_quantizer_that_compares_most_is_the_headline_s(row: Callable[..., Row]) -> None:
    rows = _pair(row, [80.0], [90.0], quantizer="a") + _pair(row, [80.0], [90.0], quantizer="b")
    rows.append(row(method="vkd", quantizer="a", bits=4))
    rows = [r for r in rows if (r.quantizer, r.role) != ("a", "teacher")]
    said = _said(rows)
    assert said.headline.startswith("digits at equal bytes (b, 1 seed)")
    assert said.lines[0].cells[0] == "vkd vs teacher, b"


def test_models_of_one_method_are_told_apart(row: Callable[..., Row]) -> None:
    rows = [row(method="vkd", arch=arch) for arch in ("a", "b")] + [row(method="teacher", arch="big")]
    assert {line.cells[0] for line in _said(rows).lines} == {"vkd (a) vs teacher", "vkd (b) vs teacher"}


def test_nothing_from_nothing() -> None:
    assert answers(named([])) == []


def test_how_fast_the_models_are(row: Callable[..., Row]) -> None:
    rows = _pair(row, [90.0, 90.2], [91.0, 91.2])
    rows = [replace(r, latency_ms_torch=3.0 if r.role == "teacher" else 1.0) for r in rows]
    assert "Latency (ms, PyTorch float32, batch 1): teacher 3, vkd 1." in _said(rows).made
    exported = [replace(r, latency_ms_onnx_int8=r.latency_ms_torch / 4, top1_onnx_int8=r.top1) for r in rows]
    assert "Latency (ms, ONNX Runtime INT8, batch 1): teacher 0.75, vkd 0.25." in _said(exported).made
    assert len(_said(exported[:2]).made) == 1  # of one model only
