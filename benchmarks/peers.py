"""Other ways to run a model fast on a CPU, to stand beside fastvit: each is optional and brings its own library."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit._compat import MissingLibraryError, import_library
from fastvit.bench import peak

Peer = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Configured:
    """A peer's call, and the settings that made it fast."""

    run: Callable[[Tensor], Tensor]
    settings: str

    def __call__(self, image: Tensor) -> Tensor:
        return self.run(image)


def fastest(calls: Iterable[Configured], image: Tensor) -> Configured:
    """A peer at its best on this image."""

    def seconds(call: Configured) -> float:
        call(image)
        return min(peak.seconds_of(lambda: call(image)) for _ in range(2))

    with torch.inference_mode():
        return min(calls, key=seconds)


def compiled(model: nn.Module, image: Tensor) -> Configured:
    """torch.compile with frozen weights.

    In float32 it gives static shapes to MKL, which on AMD's CPUs is half as fast as oneDNN.
    """
    torch._dynamo.reset()  # or the models before this one count as recompilations, of which there is a limit
    return fastest([_compiled(model, image, dynamic) for dynamic in (False, True)], image)


def _compiled(model: nn.Module, image: Tensor, dynamic: bool) -> Configured:
    import torch._inductor.config as inductor

    call = torch.compile(copy.deepcopy(model), dynamic=dynamic)
    with inductor.patch(freezing=True), torch.inference_mode():
        call(image)

    def run(image: Tensor) -> Tensor:
        with torch.compiler.set_stance("fail_on_recompile"):  # weights would no longer be frozen
            return call(image)

    return Configured(run, f"freezing, dynamic={dynamic}")


def openvino(model: nn.Module, image: Tensor) -> Configured:
    """OpenVINO with all threads on the batch, or with a stream of its own for each share of it."""
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[image.dtype]
    threads, batch = torch.get_num_threads(), image.shape[0]
    streams = [n for n in sorted({1, threads, 2 * threads}) if batch % n == 0]
    return fastest((_openvino(model, image, precision, n) for n in streams), image)


def _openvino(model: nn.Module, image: Tensor, precision: str, streams: int) -> Configured:
    ov = import_library("openvino")
    # It takes float32 arrays and rounds them itself.
    parts = [part.contiguous().numpy() for part in image.float().chunk(streams)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A static shape, for which its kernels are chosen.
        converted = ov.convert_model(
            copy.deepcopy(model).float(), example_input=torch.from_numpy(parts[0]), input=[list(parts[0].shape)]
        )
    hint = "LATENCY" if streams == 1 else "THROUGHPUT"
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": hint,
        "NUM_STREAMS": streams,
    }
    core = ov.Core()
    compiled = core.compile_model(converted, "CPU", settings)
    # A CPU without instructions for bfloat16 multiplies in float32, in OpenVINO as in fastvit.
    native = precision == "f32" or precision.upper() in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    expected, ran = precision if native else "f32", _precisions(compiled)
    assert ran == {expected}, f"OpenVINO was asked for {precision} and multiplies in {ran}"
    requests = [compiled.create_infer_request() for _ in parts]

    def run(_: Tensor) -> Tensor:
        for request, part in zip(requests, parts, strict=True):
            request.start_async([part], share_inputs=True)
        for request in requests:
            request.wait()
        return torch.cat([torch.from_numpy(request.get_output_tensor(0).data) for request in requests])

    return Configured(run, f"{hint}, {streams} stream{'s' if streams > 1 else ''}, {expected}")


def _precisions(compiled: Any) -> set[str]:
    """What the products of an OpenVINO model really run in, as its own graph of executed layers says."""

    def say(value: Any) -> str:
        return value.astype(str) if hasattr(value, "astype") else str(value)

    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return {say(info["runtimePrecision"]) for info in infos if say(info["layerType"]) == "FullyConnected"}


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
    """onnxruntime has no bfloat16 on CPU, and int8 needs each peer's own quantiser."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and peer != "onnxruntime")


def missing(peer: str) -> str | None:
    """What to install before this peer can run, or None."""
    try:
        for library in {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnxscript"]}.get(peer, []):
            import_library(library)
    except MissingLibraryError as error:
        return str(error)
    return None


PEERS: dict[str, Peer] = {"compile": compiled, "openvino": openvino, "onnxruntime": onnxruntime}
