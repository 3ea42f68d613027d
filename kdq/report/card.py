"""The card of a shared model: README.md of its repository on the Hugging Face hub, from its row and its packed file."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from kdq.quant.solvers.alphabet import code_bits
from kdq.records.rows import Row
from kdq.report.cells import printable
from kdq.report.tables import markdown_table, markdown_text
from kdq.report.words import Answer
from kdq.utils.hub import HUB
from kdq.utils.version import __version__


def card(
    repository: str,
    header: Mapping[str, Any],
    size: int,
    row: Row | None = None,
    answer: Answer | None = None,
    files: Mapping[str, str] | None = None,
    licence: str = "unknown",
) -> str:
    """The text of the card of ``repository``, ``owner/name``: from the packed file's ``header`` and ``size``, its row,
    the answer of its study, and the other files by name, with what is to be said of each; a ``.png`` is shown."""
    name, files = repository.partition("/")[2], files or {}
    parts = [f"---\n{_metadata(name, row, licence).to_yaml()}\n---", "", f"# {markdown_text(name)}", ""]
    parts += [f"{markdown_text(_sentence(header, size, row))}", "", *_loading(repository, header), ""]
    parts += markdown_table(("what it is", ""), _facts(header, size, row))
    if answer is not None:
        parts += ["## The study that it is from", ""]
        parts += [f"**{markdown_text(answer.headline)}**\n", *(f"{markdown_text(text)}\n" for text in answer.made)]
    parts += [f"![{file.removesuffix('.png').replace('_', ' ')}]({file})\n" for file in files if file.endswith(".png")]
    parts += ["## Files", ""]
    told = {file: said for file, said in files.items() if not file.endswith(".png")}
    parts += [f"- [`{file}`]({file}): {markdown_text(said)}" for file, said in told.items()]
    return "\n".join(parts).rstrip() + "\n"


def _metadata(name: str, row: Row | None, licence: str) -> ModelCardData:
    """What the hub reads of the card."""
    measured: dict[str, Any] = {}
    if row is not None and not row.limited:
        data = printable(row.data)
        result = EvalResult("image-classification", data, data, "accuracy", round(row.top1, 2), dataset_split="test")
        result.metric_name = "top-1 (%)"
        measured = {"model_name": name, "eval_results": [result]}
    tags = ["kdq", "quantization", *([] if row is None else [printable(row.arch), printable(row.method)])]
    return ModelCardData(
        license=licence, library_name="kdq", pipeline_tag="image-classification", tags=tags, **measured
    )


def _sentence(header: Mapping[str, Any], size: int, row: Row | None) -> str:
    what = f"An image classifier with weights of {_bits(header):.3g} bits, {size:,} bytes in all"
    if row is None:
        return f"{what}."
    return (
        f"{what}: top-1 {row.top1:.2f} % on the test images of {printable(row.data)}, where the float network "
        f"({row.float_bytes:,} bytes) has {row.top1_float:.2f} %."
    )


def _loading(repository: str, header: Mapping[str, Any]) -> Iterator[str]:
    """Three lines of Python, and what the network takes."""
    own = "" if header["net"] else ", network=MyNetwork()"
    yield from ("```python", "import kdq", "", f'network = kdq.load("{HUB}{repository}"{own})', "```", "")
    if not header["net"]:
        yield "The file does not say its architecture: pass an instance of it.\n"
    if taken := header.get("preprocess"):
        sides = [len(taken["mean"]), *taken.get("size", ("height", "width"))]
        mean, std = (", ".join(f"{value:.4g}" for value in taken[part]) for part in ("mean", "std"))
        cut = ""
        if "resize" in taken:
            cut = f" cut from the centre of images whose shorter side was scaled to {taken['resize']} pixels"
            cut += f" ({printable(str(taken.get('interpolation')))}),"
        yield (
            f"It takes batches of images of {' × '.join(map(str, sides))} (channels, height, width),{cut} "
            f"scaled to 0..1, then normalised with the mean {mean} and the standard deviation {std}, and gives logits."
        )


def _facts(header: Mapping[str, Any], size: int, row: Row | None) -> list[tuple[str, str]]:
    """The lines of the table."""
    if row is None:
        net = printable(str((header["net"] or {}).get("_target_", "not said in the file")).rpartition(".")[2])
        facts = [("architecture", net), ("bits", f"{_bits(header):.4g}"), ("bytes", f"{size:,}")]
    else:
        texts: dict[str, Any] = {name: printable(x) for name, x in vars(row).items() if x and isinstance(x, str)}
        row = replace(row, **texts)
        epochs = "weights from a file" if row.epochs == 0 else f"{row.epochs} epochs" if row.epochs else ""
        trained = ", ".join(part for part in (epochs, row.recipe) if part) or "not recorded"
        tuned = f", then {row.tune} ({row.tune_epochs} epochs)" if row.tune else ""
        facts = [
            ("data", row.data),
            ("architecture", f"{row.arch} ({row.role}), {row.params:,} parameters"),
            ("method", f"{row.method}, seed {row.seed}"),
            ("training", f"{trained}{tuned}"),
            ("quantizer", f"{row.quantizer}, {row.alphabet} alphabet, {row.calibration_images:,} calibration images"),
            ("bits", f"{row.avg_bits:.4g}" + (f", activations {row.act_bits}" if row.act_bits < 32 else "")),
            ("bytes", f"{size:,} (float {row.float_bytes:,})"),
            ("top-1 on the test images", f"{row.top1:.2f} % (float {row.top1_float:.2f} %)"),
            ("measured on", row.device),
        ]
        facts += [("A TRIAL, NO RESULT", row.limited)] if row.limited else []
    if names := [printable(str(name)) for name in header.get("classes") or ()]:
        facts.append(("classes", ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")))
    return [*facts, ("made by", f"kdq {row.kdq_version if row else __version__}")]


def _bits(header: Mapping[str, Any]) -> float:
    """The bits of a quantized weight on average; 32 where nothing is quantized."""
    layers = [(math.prod(layer["shape"]), code_bits(layer["levels"])) for layer in header["layers"].values()]
    count = sum(weights for weights, _ in layers)
    return sum(weights * bits for weights, bits in layers) / count if count else 32.0
