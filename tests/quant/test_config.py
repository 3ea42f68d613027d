"""Options: one place, nothing ignored, every mistake answered with what there is."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq import KdqError
from kdq.quant.batches import first_pairs, images_of, labels_of
from kdq.quant.bitsearch.config import SearchConfig
from kdq.quant.config import QuantConfig
from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.alphabets import uniform
from kdq.quant.solvers.rtn import rtn
from kdq.stages.asked import quant_config, quant_spec, search_config
from kdq.utils.config import compose


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def codes(model: nn.Module) -> list[Tensor]:
    return [weight.codes for weight in model.quantized_weights.values()]


def test_the_config_s_defaults_are_the_library_s() -> None:
    assert quant_config(compose([]).quant) == quant_config(compose(["quant=best"]).quant) == QuantConfig()
    found = search_config(compose(["quant=greedy"]).quant)
    assert found == SearchConfig(avg_bits=3.0)


def test_every_choice_of_the_config_is_a_quantizer() -> None:
    gpfq = quant_config(compose(["quant=gpfq"]).quant)
    assert gpfq == QuantConfig(solver="gpfq")
    assert (gpfq.preset.order, gpfq.preset.scale, gpfq.preset.refine, gpfq.preset.ridge) == ("natural", "weight", 0, 0)
    assert quant_config(compose(["quant=greedy"]).quant) == QuantConfig()
    spfq = quant_config(compose(["quant=spfq", "seed=7"]).quant)
    assert callable(spfq.solver)
    assert spfq.solver.keywords == {"seed": 7}  # type: ignore[union-attr]
    published = quant_config(compose(["quant=published"]).quant)
    assert published.moments is not None
    assert published.moments(nn.Linear(2, 2), True).share == 0.25
    assert quant_config(compose(["quant.keep_float=[a,b]"]).quant).keep_float == ("a", "b")


def test_options_replace_what_the_preset_stands_for() -> None:
    best = QuantConfig().preset
    assert QuantConfig(order="natural", ridge=0).preset == replace(best, order="natural", ridge=0)
    options = {"order": "gram", "scale": "gram", "refine": 3, "ridge": best.ridge, "held_out": best.held_out}
    assert QuantConfig(solver="qronos", **options).preset == best
    assert QuantConfig(solver=rtn).preset == QuantConfig(solver="rtn").preset
    layer = QuantConfig(per_channel=False).preset
    assert (layer.scale, layer.refine, layer.order) == ("weight", 0, best.order)


def test_rows_have_the_keys_of_what_their_presets_stand_for() -> None:
    spec = quant_spec(compose(["quant=gpfq"]).quant)
    assert (spec["order"], spec["scale"], spec["refine"], "ridge" in spec) == ("natural", "weight", 0, False)
    assert quant_spec(compose(["quant=gpfq", "quant.order=natural", "quant.ridge=0"]).quant) == spec
    assert quant_spec(compose(["quant=best"]).quant)["ridge"] == QuantConfig().preset.ridge
    assert quant_spec(compose(["quant=none"]).quant)["order"] == "natural"


def test_a_config_its_fields_and_both_give_the_same_network() -> None:
    images = [torch.randn(40, 6)]
    expected = codes(kdq.quantize(network(), images, 2, QuantConfig(solver="gptq", order="gram", refine=1))[0])
    for config, options in (
        (None, {"solver": "gptq", "order": "gram", "refine": 1}),
        (QuantConfig(solver="rtn", order="gram", refine=1), {"solver": "gptq"}),
    ):
        found = codes(kdq.quantize(network(), images, 2, config, **options)[0])
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bit": 4}, r"unknown option bit \(did you mean bits\?\)"),
        ({"solvr": "rtn"}, r"did you mean solver\?.*alphabet"),
        ({"zzz": 1}, r"unknown option zzz: bits, solver"),
        ({"config": "gptq"}, r"config='gptq' is no QuantConfig: .* solver='gptq'"),
        ({"order": "falling"}, "order='falling' is unknown: use one of natural, gram"),
        ({"act_range": "max"}, "act_range='max' is unknown: use one of mse, percentile"),
        ({"per_channel": "yes"}, "per_channel='yes' must be true or false"),
        ({"refine": True}, "refine=True must be a whole number"),
        ({"refine": -1}, "refine=-1 must be a number of at least 0"),
        ({"first_last_bits": 1}, "first_last_bits=1 must be a whole number from 2 to 32"),
        ({"act_bits": 16}, "act_bits=16 must be a number from 2 to 8"),
        ({"float_dtype": "fp8"}, "float_dtype='fp8' is unknown"),
        ({"keep_float": "0"}, r"keep_float='0': give a list of names, \[0\]"),
        ({"moments": 3}, "moments=3 is no function"),
    ],
)
def test_an_option_that_is_wrong_is_named_with_the_right_ones(options: dict[str, Any], says: str) -> None:
    with pytest.raises(KdqError, match=says) as caught:
        kdq.quantize(network(), [torch.randn(4, 6)], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gives", [lambda q: q * math.nan, lambda q: q[..., 1:], lambda q: q.mT, lambda q: None])
def test_what_a_solver_of_ones_own_must_give_is_said(gives: Callable[[Tensor], Any]) -> None:
    def solver(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet) -> Any:
        return gives(alphabet.nearest(weight))

    with pytest.raises(KdqError, match=r"^0: the solver must give finite values in the weight's shape \(1, 8, 6\)$"):
        kdq.quantize(network(), [torch.randn(4, 6)], solver=solver)


def test_values_that_are_not_of_the_alphabet_are_not_rounded_in_silence() -> None:
    def solver(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet) -> Tensor:
        return weight

    with pytest.raises(KdqError, match=r"^0: the solver must give values of its alphabet"):
        kdq.quantize(network(), [torch.randn(4, 6)], solver=solver, bits=4)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: None,
        lambda a: replace(a, scale=-a.scale),
        lambda a: replace(a, scale=a.scale * math.nan),
        lambda a: replace(a, scale=a.scale.mT),
        lambda a: replace(a, zero=a.zero[0]),
        lambda a: replace(a, zero=2),
        lambda a: replace(a, levels=1),
        lambda a: replace(a, levels=4.0),
    ],
)
def test_what_an_alphabet_of_ones_own_must_be_is_said(change: Callable[[Alphabet], Any]) -> None:
    with pytest.raises(KdqError, match=r"^0: the alphabet must be an Alphabet .* of shape \(1, 8, 1\)$"):
        kdq.quantize(network(), [torch.randn(4, 6)], alphabet=lambda w, bits: change(uniform(w, bits)), bits=4)


@pytest.mark.parametrize("name", ["avg_bits", "size_bytes", "max_drop"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, True, "3"])
def test_a_budget_that_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(KdqError, match=f"{name}=.* must be"):
        SearchConfig(**{name: value})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"candidates": [4]}, "at least two candidate widths"),
        ({"candidates": [1, 4]}, "candidates=1 must be a whole number"),
        ({"method": "anneal"}, "use one of greedy, exact"),
        ({"context": "here"}, "use one of chosen, widest"),
        ({"validation_images": 0}, "validation_images=0 must be a number of at least 1"),
        ({"avg_bits": 1.5}, "cannot meet its budget"),
    ],
)
def test_a_search_that_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(KdqError, match=says):
        SearchConfig(**({"avg_bits": 3.0} | options))


def test_widths_of_a_search_are_its_candidates() -> None:
    with pytest.raises(KdqError, match=r"quant.bits=\[2, 4\] .* as quant.search.candidates"):
        search_config(compose(["quant=greedy", "quant.bits=[2,4]"]).quant)


def test_batches_of_any_form_give_the_same_codes() -> None:
    images, labels = torch.randn(12, 6), torch.arange(12) % 3
    expected = codes(kdq.quantize(network(), [images], 3)[0])
    for batch in (
        (images, labels),
        [images, labels, "path"],
        {"label": labels, "image": images},
        {"pixel_values": images, "labels": labels},
        {"x": images, "y": labels},
    ):
        found = codes(kdq.quantize(network(), [batch], 3)[0])
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert torch.equal(labels_of(batch), labels)
        assert [len(x) for x, _ in first_pairs([batch, batch], 17)] == [12, 5]


@pytest.mark.parametrize("batch", [{"picture": torch.zeros(2, 6)}, ["a.png"], "a.png", [], {"x": "a.png"}])
def test_a_batch_without_images_is_answered_with_what_is_expected(batch: Any) -> None:
    with pytest.raises(KdqError, match=r"its images must be a tensor, item 0 of .* dictionary's image, images, x"):
        images_of(batch)
    with pytest.raises(KdqError, match="its labels must be item 1 of a tuple or list, or a dictionary's label"):
        labels_of(batch)


def test_networks_without_values_are_refused() -> None:
    images = [torch.randn(4, 6)]
    with pytest.raises(KdqError, match=r"0.weight is on the meta device.*load them first"):
        kdq.quantize(network().to("meta"), images)
    with pytest.raises(KdqError, match=r"0.weight is lazy.*run the network once"):
        kdq.quantize(nn.Sequential(nn.LazyLinear(3)), images)
    with pytest.raises(KdqError, match=r"1.weight is lazy"):
        kdq.quantize(nn.Sequential(nn.Linear(6, 3), nn.LazyBatchNorm1d()), images)
