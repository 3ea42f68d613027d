"""A cell's model, or any packed file, as another runtime loads it, or on the hub: what ``kdq-export`` does."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from kdq.deploy.formats import SUFFIXES
from kdq.deploy.graph import torch_program
from kdq.deploy.onnx_files import onnx_models
from kdq.deploy.runtime import runner, session, top1
from kdq.quant.packing.file import load_packed, read_header
from kdq.records.rows import Row, find_row, read_rows
from kdq.report.card import card
from kdq.report.material import Material
from kdq.report.publish import public
from kdq.stages.cell import Cell
from kdq.stages.deploy import calibration, compare, packed_network
from kdq.utils.config import choices, compose
from kdq.utils.errors import KdqError
from kdq.utils.files import replacing, write_text
from kdq.utils.hub import CARD, HUB, PACKED, ROW, upload
from kdq.utils.version import __version__

#: What of a row's config says which images it was measured and calibrated on.
SPLIT = ("val_fraction", "split_seed", "train_limit", "test_limit")
#: What every export chooses of the config.
CHOSEN = ("deploy=onnx", "logger=none")
#: The figure of a report that a shared model's card shows.
FIGURE = "accuracy_vs_bytes.png"


@dataclass(frozen=True)
class Source:
    """What is exported: a packed file, and its row and the folder that has it where they are known."""

    packed: Path
    row: Row | None = None
    output: Path | None = None


def find(cell: str, output: Path) -> Source:
    """The packed file that ``cell`` means: a row's file, a packed file, or the ``config_hash`` of a row below
    ``output``, or the start of it."""
    path = Path(cell)
    if path.suffix == ".kdq":
        if not path.is_file():
            raise KdqError(f"no file {path}")
        root = path.resolve().parent.parent.parent if path.resolve().parent.name == "quantized" else None
        rows = read_rows(root / "rows", {path.stem.rpartition("-")[2]}) if root else []
        return Source(path, rows[0], root) if rows else Source(path)
    root, row = path.resolve().parent.parent if path.suffix == ".json" else output, find_row(cell, output)
    if not (packed := root / row.artifact).is_file():
        raise KdqError(f"the packed file {packed} of this row is gone: run its command again")
    return Source(packed, row, root)


def export(source: Source, kind: str, target: Path, overrides: Sequence[str] = ()) -> str:
    """Write ``source`` to ``target`` in the format ``kind`` of :data:`SUFFIXES`; returns what to say about it. An ONNX
    model that the row has measurements of is copied; another is measured now, and the row stays as it is.

    Args:
        overrides: of ``kdq``'s config: to name the images that INT8 is calibrated and measured on, and the architecture
            if it is not of this library.
    """
    row, name = source.row, kind.removeprefix("onnx-")
    accuracy, file = getattr(row, f"top1_onnx_{name}", None), source.packed.with_suffix(f".{name}.onnx")
    measured = row is not None and not overrides and accuracy is not None and file.is_file()
    if kind == "packed" or measured:
        with replacing(target) as temporary:
            shutil.copyfile(file if measured else source.packed, temporary)
        if row is None or not measured:
            return ""
        latency = f"{getattr(row, f'latency_ms_onnx_{name}'):.2f} ms an image on {row.latency_threads} threads"
        return f"top-1 {accuracy:.2f} on the test set, {row.top1:.2f} as evaluated; {latency}"
    network = _network(source, overrides)
    if kind == "torch":
        program = torch_program(network, _shape(network, None))
        with replacing(target) as temporary:
            torch.export.save(program, temporary)
        return ""
    cell, missing = _cell(source, network, overrides)
    if cell is None and name == "int8":
        raise KdqError(f"INT8 needs calibration images: {missing}")
    images = (calibration(cell), cell.cfg.deploy.act_range) if cell else ()
    model = onnx_models(network, _shape(network, cell), [name], *images)[name]
    with replacing(target) as temporary:
        temporary.write_bytes(model)
    if cell is None:
        return f"not measured: {missing}"
    run = runner(session(model, cell.cfg.deploy.threads))
    accuracy = top1(run, cell.images.evaluation("test", torch.device("cpu")))
    if row is None:
        return f"top-1 {accuracy:.2f} on the test set"
    compare(row, name, accuracy, source.packed)
    return f"top-1 {accuracy:.2f} on the test set, {row.top1:.2f} as evaluated"


def share(source: Source, kind: str, target: str, licence: str = "unknown", overrides: Sequence[str] = ()) -> str:
    """Upload ``source`` to ``target``, ``hf:owner/name``: its packed file, the file of ``kind`` where that is another,
    its row, the figure of its report and a card, with a ``licence`` by its name there. Returns the address."""
    header, files = read_header(source.packed), {PACKED: "the packed network"}
    with TemporaryDirectory() as name:
        folder, answer = Path(name), None
        shutil.copyfile(source.packed, folder / PACKED)
        if kind != "packed":
            file = f"model{SUFFIXES[kind]}"
            said = export(source, kind, folder / file, overrides)
            files[file] = f"{kind}, {(folder / file).stat().st_size:,} bytes" + (f"; {said}" if said else "")
        if source.row is not None:
            write_text(folder / ROW, json.dumps(dataclasses.asdict(public(source.row)), indent=1) + "\n")
            files[ROW] = f"what was measured, and the config that makes it again: kdq-reproduce {target}"
        if source.row is not None and source.output is not None:
            answer = next((x for x in Material(source.output).answers if x.data == source.row.data and x.lines), None)
            if answer and (figure := source.output / "report" / FIGURE).is_file():
                shutil.copyfile(figure, folder / FIGURE)
                files[FIGURE] = ""
        size, repository = source.packed.stat().st_size, target.removeprefix(HUB)
        write_text(folder / CARD, card(repository, header, size, source.row, answer, files, licence))
        return upload(folder, target, f"{source.packed.stem}, kdq {__version__}")


def names_model(overrides: Sequence[str]) -> bool:
    """Whether the overrides say how the network is built."""
    return any(override.lstrip("+").startswith(("model@", "teacher.net", "student.net")) for override in overrides)


def _network(source: Source, overrides: Sequence[str]) -> nn.Module:
    """The packed network, built as the overrides say where they name a model."""
    if names_model(overrides):
        return packed_network(Cell(compose([*_own(source, overrides), *overrides])), source.packed)
    try:
        return load_packed(source.packed)
    except KdqError as error:
        if "network=" not in str(error):
            raise
        role = source.row.role if source.row else "student"
        raise KdqError(
            f"{source.packed} does not say an architecture that kdq builds by itself: add the model's overrides, such "
            f"as model@{role}=custom {role}.name=NAME {role}.net._target_=PACKAGE.FUNCTION"
        ) from error


def _own(source: Source, overrides: Sequence[str]) -> list[str]:
    """What is known of the source's config."""
    row, own = source.row, list(CHOSEN)
    own += [f"paths.output_dir={source.output}"] if source.output else []
    if row is not None:
        own += [f"seed={row.seed}"] + ["method=teacher"] * (row.role == "teacher")
        given = any(override.startswith("data=") for override in overrides)
        own += [f"data={row.data}"] if not given and row.data in choices("data") else []
        split = {name: ((row.config or {}).get("data") or {}).get(name) for name in SPLIT}
        own += [f"data.{name}={value}" for name, value in split.items() if isinstance(value, (int, float))]
    return own


def _cell(source: Source, network: nn.Module, overrides: Sequence[str]) -> tuple[Cell | None, str]:
    """The config and the images of the source's data set; or None, and what is missing."""
    data, own = source.row.data if source.row else None, _own(source, overrides)
    if not any(override.startswith("data=") for override in [*own, *overrides]):
        what = "the packed file does not say its data set" if data is None else f"{data} is not a data set of conf/data"
        return None, f"{what}: add overrides such as data=image_folder data.name={data or 'NAME'} data.root=FOLDER"
    card = getattr(network, "kdq_preprocess", None)
    if card:
        own += [f"data.mean={card['mean']}".replace(" ", ""), f"data.std={card['std']}".replace(" ", "")]
    cell = Cell(compose([*own, *overrides]))
    if data is not None and cell.cfg.data.name != data:
        raise KdqError(f"the cell is of data {data}, not {cell.cfg.data.name}: give data.name={data} if it is the same")
    if card and len(card["mean"]) != (channels := cell.cfg.data.in_channels):
        taken, name = len(card["mean"]), cell.cfg.data.name
        raise KdqError(f"the network takes images of {taken} channels, those of {name} have {channels}")
    return cell, ""


def _shape(network: nn.Module, cell: Cell | None) -> tuple[int, int, int]:
    """Shape of one image, as the packed file says, and as the data set has it."""
    card = getattr(network, "kdq_preprocess", None) or {}
    own = (len(card["mean"]), card["size"][0], card["size"][1]) if "size" in card else None
    if cell is None:
        if own is None:
            raise KdqError("the packed file does not say the size of its images: pack it again with a newer kdq")
        return own
    if own not in (None, cell.shape):
        wanted, given = ("x".join(map(str, shape)) for shape in (own, cell.shape))
        name = cell.cfg.data.name
        raise KdqError(f"the network takes images of {wanted} (channels, height, width), those of {name} have {given}")
    return cell.shape
