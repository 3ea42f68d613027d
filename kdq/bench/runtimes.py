"""Other runtimes of the same models: OpenVINO for ONNX files, Inductor for torch networks, in float and INT8."""

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.deploy.runtime import openvino

Call = Callable[[], Any]


def others(models: Mapping[str, Path], network: nn.Module, images: Tensor, threads: int) -> dict[str, Call]:
    """A call on ``images`` for each of the ONNX ``models`` in OpenVINO, and for the float ``network`` in torch: eager,
    compiled, and compiled in INT8. What is not installed is left out: openvino, torchao, the C++ compiler that
    Inductor needs.

    The networks run with torch's number of threads, which becomes ``threads``.
    """
    torch.set_num_threads(threads)
    calls: dict[str, Call] = {}
    if find_spec("openvino"):
        runs = openvino(models, threads)
        calls |= {f"OpenVINO {name}": partial(run, images.numpy()) for name, run in runs.items()}
    network = copy.deepcopy(network).eval()
    calls["torch eager"] = lambda: network(images)
    if not shutil.which("g++"):
        return calls
    calls["torch compiled"] = compiled(network, images)
    if find_spec("torchao"):
        calls["torch compiled int8"] = compiled(inductor_int8(network, [images]), images)
    return calls


def compiled(network: Any, images: Tensor) -> Call:
    """``torch.compile`` with constant weights."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch(freezing=True), torch.no_grad():
        run = torch.compile(network)
        run(images)
        run(images)
    return lambda: run(images)


def inductor_int8(network: nn.Module, batches: Iterable[Tensor]) -> Any:
    """torchao's PT2E INT8 of ``network`` for Inductor on x86, with ranges from ``batches``."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    network, batches = copy.deepcopy(network), list(batches)
    for module in network.modules():  # it takes no module that is called twice, as the ReLU of a residual block is
        for name in [name for name, child in module.named_children() if isinstance(child, nn.ReLU)]:
            if isinstance(module, nn.Sequential):
                module._modules[name] = nn.ReLU()
            else:
                del module._modules[name]
                object.__setattr__(module, name, F.relu)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(network, (batches[0],)).module(), quantizer)
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)
