"""What runs and artifacts are called, so that one stage finds what another one made."""

import hashlib
import re

#: The metric that accuracies are drawn over where size matters.
BYTES = "quantize/size_bytes"


def run_id(job_type: str, key: str, folder: str) -> str:
    """The id of a stage's run: the same whenever the stage is run again in the same output folder."""
    digest = hashlib.sha256(f"{folder} {job_type} {key}".encode()).hexdigest()
    return f"{job_type}-{digest[:16]}"


def valid_name(name: str) -> str:
    """``name`` as W&B accepts it for artifacts."""
    return re.sub(r"[^\w.-]+", "-", name)[:128]


def reference(name: str, key: str) -> str:
    """The one version of artifact ``name`` that holds the model ``key``."""
    return f"{valid_name(name)}:{key}"


def pareto_curve(data: str) -> str:
    """The metric of the Pareto front of a data set, logged by the run of a sweep."""
    return f"pareto/{data}"


def series(method: str, arch: str, quantizer: str, act_bits: int, tune: str = "") -> str:
    """What one curve stands for: a model and how it was quantized; its seeds are averaged."""
    return f"{method} {arch} {quantizer}" + ("" if act_bits == 32 else f" A{act_bits}") + (f" {tune}" if tune else "")
