"""Other ways to run a model fast on a CPU, to stand beside fastvit: each is optional and brings its own library."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvit._compat import MissingLibraryError, import_library

Peer = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


def compiled(model: nn.Module, image: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.compile with frozen weights."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        run = torch.compile(copy.deepcopy(model), dynamic=False)
        with torch.inference_mode():
            run(image)
    return run


def openvino(model: nn.Module, image: Tensor) -> Callable[[Tensor], Tensor]:
    ov = import_library("openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[image.dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = ov.convert_model(copy.deepcopy(model).float(), example_input=image.float())
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(converted, "CPU", settings).create_infer_request()
    # It takes float32 arrays and rounds them itself.
    array = image.float().numpy()

    def run(_: Tensor) -> Tensor:
        request.infer([array])
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def onnxruntime(model: nn.Module, image: Tensor) -> Callable[[Tensor], Tensor]:
    ort = import_library("onnxruntime")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(copy.deepcopy(model), (image,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image.numpy()}
    return lambda _: torch.from_numpy(session.run(None, feed)[0])


def serves(peer: str, dtype: torch.dtype) -> bool:
    """onnxruntime has no bfloat16 on CPU."""
    return peer != "onnxruntime" or dtype == torch.float32


def missing(peer: str) -> str | None:
    """What to install before this peer can run, or None."""
    try:
        for library in {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnxscript"]}.get(peer, []):
            import_library(library)
    except MissingLibraryError as error:
        return str(error)
    return None


PEERS: dict[str, Peer] = {"compile": compiled, "openvino": openvino, "onnxruntime": onnxruntime}
