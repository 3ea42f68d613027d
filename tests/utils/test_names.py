"""Names that never change, whatever moves."""

import re
from pathlib import Path

from kdq.quant.config import SOLVERS
from kdq.records.store import key_of
from kdq.utils.names import STABLE, stable

ROOT = Path(__file__).parents[2]


def test_every_object_of_kdq_that_a_config_calls_has_a_stable_name() -> None:
    called = {
        target
        for path in (ROOT / "conf").rglob("*.yaml")
        for target in re.findall(r"^\s*(?:_target_|path): (kdq\.[\w.]+)", path.read_text(), re.M)
    }
    assert called
    assert called <= set(STABLE)
    assert set(SOLVERS) <= set(STABLE.values())
    assert not [name for name in STABLE.values() if "." in name]  # nothing that can be imported


def test_a_key_is_the_same_wherever_an_object_lies() -> None:
    def key(net: str, method: str, solver: str) -> str:
        return key_of({
            "networks": {"student": {"net": {"_target_": net, "depth": 20}}}, "method": {"_target_": method},
            "quant": {"solver": {"_target_": "hydra.utils.get_method", "path": solver}},
        })  # fmt: skip

    old = key("kdq.models.CifarResNet", "kdq.distill.vkd.VKD", "kdq.quant.spfq.spfq")
    assert old == key("kdq.models.networks.CifarResNet", "kdq.distill.VKD", "kdq.quant.solvers.spfq.spfq")
    assert old != key("kdq.models.CifarResNet", "kdq.distill.DKD", "kdq.quant.spfq.spfq")
    assert key("mine.net", "kdq.distill.VKD", "x.y") != key("mine.other", "kdq.distill.VKD", "x.y")


def test_code_of_ones_own_and_other_texts_stay() -> None:
    config = {"_target_": "mine.net", "path": "data/kdq", "list": [{"note": "kdq.models.CifarResNet"}], "none": None}
    assert stable(config) == config
    assert stable({"path": "kdq.models.CifarResNet"}) == {"path": "kdq.models.CifarResNet"}
