"""One CUDA graph: a forward as it was captured for one kind of call, and its replay.

A graph launches dozens of kernels at once, but is blind: it has the shapes, addresses, settings and Python of one call
baked in.  So there is one for each kind of call and each bucket of batch sizes, and before it is believed the forward
has to prove that a graph can stand for it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree
from torch.utils._device import DeviceContext

from fastvit.adapters.parts import mode_obstacle
from fastvit.ops import _backend

# A batch runs in the next bucket.  Above the last one a GPU has more to do than Python to launch; between powers of two
# lie the halves, so that a batch of five does not cost as much as one of eight.
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

# A row of a batch and the same row alone go through other kernels, and differ by their rounding.
_ROUNDING = 0.05

TENSORS = (Tensor, nn.Parameter)
_CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
_LEAVES = frozenset((*TENSORS, *_CONSTANTS))


class NotGraphed(Exception):
    """Why a call must run without a graph; the message is shown in the report."""


class Coupled(NotGraphed):
    """A forward whose outputs are not a row per image, each made from that image alone: it can't be padded."""


# ---- The machine -----------------------------------------------------------------------------------


class Recorder(Protocol):
    """What makes graphs on a device."""

    device_type: str

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def is_capturing() -> bool:
        """Is the caller inside of somebody's capture?"""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """What is launched inside comes after what was launched in all turns before, from whichever thread."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Where the capture will be, but without capturing: for warming up."""

    def capture(self, run: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
        """(what `run` returns, replay): replay() writes new values into those tensors."""

    def wait(self) -> None:
        """Until the last turn is done."""


# torch.cuda.graph allows one at a time in a process.
_capture_lock = threading.Lock()


class CudaRecorder:
    """torch.cuda.CUDAGraph: all graphs of a model share a stream to be captured on, and memory."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()

    @staticmethod
    def is_capturing() -> bool:
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(stream)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            stream.wait_stream(self._stream)

    def capture(self, run: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        try:
            # Other threads may go on allocating.
            with (
                _capture_lock,
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                outputs = run()
        finally:
            # A capture that fails leaves its own stream current.
            torch.cuda.set_stream(stream)
        return outputs, graph.replay

    def wait(self) -> None:
        self._done.synchronize()


# ---- A call ----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """The arguments of a forward, flat."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    follows: list[bool]  # is a tensor's first dimension the batch, as far as its size tells?
    batch: int
    key: tuple[Any, ...]  # what another call must share to be served by the same graph, the batch apart

    @property
    def bucket(self) -> int:
        return next(bucket for bucket in BUCKETS if bucket >= self.batch)

    def with_tensors(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with others in place of the tensors."""
        leaves, spec = _pytree.tree_flatten((self.args, self.kwargs))
        given = iter(tensors)
        leaves = [next(given) if type(leaf) in TENSORS else leaf for leaf in leaves]
        return _pytree.tree_unflatten(leaves, spec)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str) -> Call:
    """Raises NotGraphed for arguments that can't be kept in a graph."""
    leaves: list[Any] = [*args, *kwargs.values()]
    structure: Any = (len(args), *kwargs)
    if not _LEAVES.issuperset(map(type, leaves)):
        leaves, structure = _pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if type(leaf) in TENSORS]
    batch = next((t.shape[0] for t in tensors if t.ndim), 0)
    follows = [t.ndim > 0 and t.shape[0] == batch for t in tensors]
    key: list[Any] = [structure]
    tensor = 0
    for leaf in leaves:
        kind = type(leaf)
        if kind in TENSORS:
            if leaf.device != tensors[0].device or leaf.device.type != device_type or leaf.layout is not torch.strided:
                raise NotGraphed(placement_obstacle(leaf, tensors[0], device_type))
            shape = leaf.shape[1:] if follows[tensor] else leaf.shape
            key.append((leaf.dtype, leaf.device, shape, follows[tensor], _is_channels_last(leaf)))
            tensor += 1
        elif kind in _CONSTANTS:
            key.append((kind, repr(leaf)))  # 1, 1.0 and True are equal
        else:
            raise NotGraphed(f"an argument is {kind.__name__}")
    if not batch:
        raise NotGraphed("no batch among the arguments")
    if batch > BUCKETS[-1]:
        raise NotGraphed(f"a batch above {BUCKETS[-1]}")
    key.append(_settings(device_type))
    call = Call(args, kwargs, tensors, follows, batch, tuple(key))
    try:
        hash(call.key)
    except TypeError:
        raise NotGraphed("an argument's structure has no hash") from None
    return call


def placement_obstacle(tensor: Tensor, first: Tensor, device_type: str) -> str:
    if tensor.device.type != device_type:
        return f"not on {device_type.upper()}"
    if tensor.layout is not torch.strided:
        return f"an argument's layout is {tensor.layout}"
    return f"arguments on {first.device} and {tensor.device}"


def _is_channels_last(t: Tensor) -> bool:
    return t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _settings(device_type: str) -> tuple[Any, ...]:
    """What torch and fastvit choose kernels by, outside of the model."""
    return (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        *map(_backend.may_run, _backend.BACKENDS),
    )


def call_obstacle(model: nn.Module) -> str | None:
    """Why a call can't be served, as far as its arguments don't matter."""
    if model.training:
        return "training mode"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if model.__dict__.get("_is_replica"):
        return "a replica of DataParallel"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode"
    # torch.set_default_device is such a mode, too.
    if torch._C._len_torch_function_stack() and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "a function mode"
    return mode_obstacle()


# ---- A graph ---------------------------------------------------------------------------------------


class Graph:
    """A captured forward with the tensors that it reads its arguments from and writes its outputs to."""

    def __init__(self, call: Call, padded: bool) -> None:
        self.rows = call.bucket if padded else call.batch
        self._padded = padded
        self._filled = 0
        self._inputs = [
            torch.zeros(
                (self.rows, *t.shape[1:]) if follows else t.shape,
                dtype=t.dtype,
                device=t.device,
            ).contiguous(memory_format=torch.channels_last if _is_channels_last(t) else torch.contiguous_format)
            for t, follows in zip(call.tensors, call.follows, strict=True)
        ]
        self._spec: Any = None
        self._outputs: list[Any] = []
        self._replay: Callable[[], None]

    def record(self, recorder: Recorder, original: Callable[..., Any], call: Call, weights: tuple[Tensor, ...]) -> None:
        """Capture `original`; raises NotGraphed, or whatever `original` raises."""
        run = functools.partial(self._run, original, call)
        self._fill(call)
        versions = [t._version for t in self._inputs]
        with recorder.aside():
            # What compiles, tunes or fills caches does so at the first run.
            run()
            outputs = run()
            if [t._version for t in self._inputs] != versions:
                raise NotGraphed("its forward writes into an argument")
            _check_outputs(outputs, [*self._inputs, *weights], self._inputs[0].device)
            if not _same(outputs, run()):
                raise NotGraphed("its forward gives another result each time")
            if self._padded:
                self._check_rows(run, call, outputs)
        self._fill(call)
        self._outputs, self._replay = recorder.capture(run)
        self._replay()
        if not all(map(_near, outputs, self._outputs)):
            raise NotGraphed("a replay gave another result than the forward")

    def run(self, call: Call) -> Any:
        self._fill(call)
        self._replay()
        return self.answer(call.batch)

    def answer(self, batch: int) -> Any:
        """Copies of the outputs, which stay when the graph runs again."""
        copies: dict[int, Any] = {}
        for t in self._outputs:
            if id(t) not in copies:
                # An output that is in two places stays one tensor.
                copies[id(t)] = (t[:batch] if self._padded else t).clone() if isinstance(t, Tensor) else t
        return _pytree.tree_unflatten([copies[id(t)] for t in self._outputs], self._spec)

    def _fill(self, call: Call) -> None:
        for mine, given, follows in zip(self._inputs, call.tensors, call.follows, strict=True):
            if follows and self._padded:
                mine[: call.batch].copy_(given, non_blocking=True)
                if self._filled > call.batch:
                    mine[call.batch : self._filled].zero_()
            else:
                mine.copy_(given, non_blocking=True)
        self._filled = call.batch

    def _run(self, original: Callable[..., Any], call: Call, rows: int | None = None) -> list[Any]:
        """The outputs for what the input tensors hold, flat; for the first `rows` alone if asked."""
        tensors = [t[:rows] if follows else t for t, follows in zip(self._inputs, call.follows, strict=True)]
        args, kwargs = call.with_tensors(tensors)
        outputs, spec = _pytree.tree_flatten(original(*args, **kwargs))
        if self._spec is None:
            self._spec = spec
        elif self._spec != spec:
            raise Coupled("its outputs have another structure for another batch")
        return outputs

    def _check_rows(self, run: Callable[..., list[Any]], call: Call, outputs: list[Any]) -> None:
        """Is the output of an image the same, bit for bit, whatever the other images are?  Else raise Coupled.

        Sizes alone can't tell: a matrix of similarities has the batch twice, and a batch of three looks like a color.
        """
        alone = run(rows=1)
        for whole, single in zip(outputs, alone, strict=True):
            if not isinstance(whole, Tensor):
                if whole != single:
                    raise Coupled("an output depends on the size of the batch")
                continue
            if not whole.ndim or (whole.shape[0], *single.shape) != (self.rows, 1, *whole.shape[1:]):
                raise Coupled("an output does not have a row per image")
            if not _near(single, whole[:1]):
                raise Coupled("an output depends on the size of the batch")
        kept = min(call.batch, self.rows - 1)
        for t, follows in zip(self._inputs, call.follows, strict=True):
            if follows:
                _replace(t, kept)
        self._filled = self.rows
        others = run()
        if not _same([_first(t, kept) for t in outputs], [_first(t, kept) for t in others]):
            raise Coupled("an image's output depends on the other images")


def _first(value: Any, rows: int) -> Any:
    return value[:rows] if isinstance(value, Tensor) else value


def _replace(t: Tensor, kept: int) -> None:
    """Put something else into the rows from `kept` on; raise Coupled where there is nothing else to put."""
    before, rows = t[kept:].clone(), t[kept:]
    if t.is_floating_point():
        # Far larger than the images, so that it would win every maximum.
        generator = torch.Generator(t.device).manual_seed(0)
        noise = torch.randn(rows.shape, generator=generator, device=t.device)
        rows.copy_(noise * 10.0 * (1.0 + t[:kept].float().abs().max()))
    elif t.dtype == torch.bool:
        rows.logical_not_()
    else:
        rows.copy_(torch.where(rows == 0, t.max(), 0))  # both are known to be accepted
    if torch.equal(before, rows):
        raise Coupled("arguments without content tell nothing")


def _check_outputs(outputs: list[Any], others: list[Tensor], device: torch.device) -> None:
    memory = {t.untyped_storage().data_ptr() for t in others}
    for value in outputs:
        if type(value) in TENSORS:
            if value.device != device or value.layout is not torch.strided:
                raise NotGraphed(f"an output is on {value.device}, {value.layout}")
            if value.numel() and value.untyped_storage().data_ptr() in memory:
                raise NotGraphed("an output shares memory with an argument or a weight")
        elif type(value) not in _CONSTANTS:
            raise NotGraphed(f"an output is {type(value).__name__}")


def _same(a: list[Any], b: list[Any]) -> bool:
    """The same bits, in tensors and in constants."""
    return len(a) == len(b) and all(
        _same_bits(x, y) if isinstance(x, Tensor) else type(x) is type(y) and repr(x) == repr(y)
        for x, y in zip(a, b, strict=True)
    )


def _near(expected: Any, actual: Any) -> bool:
    """Do two tensors differ by rounding at most?  What is no floating point may be rounded to anything."""
    if not isinstance(expected, Tensor) or not expected.is_floating_point() or _same_bits(expected, actual):
        return True
    difference = (actual.double() - expected.double()).norm()
    return bool(difference <= _ROUNDING * expected.double().norm())


def _same_bits(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (a, b))  # NaN is not equal to itself
    return torch.equal(a, b)


# ---- The capture -----------------------------------------------------------------------------------


# Is this thread warming up or capturing?  Then a graphed model inside of the model runs as it is.
_here = threading.local()


def is_recording() -> bool:
    return getattr(_here, "recording", False)


def capture(
    recorder: Recorder, original: Callable[..., Any], call: Call, padded: bool, weights: tuple[Tensor, ...]
) -> Graph:
    """A graph of `original`; raises NotGraphed, or whatever `original` raises."""
    _here.recording = True
    try:
        # Not inference tensors: the graph's own outlive the mode.
        with torch.inference_mode(False), torch.no_grad(), _autocast_without_cache(call), recorder.turn():
            graph = Graph(call, padded)
            graph.record(recorder, original, call, weights)
            return graph
    finally:
        _here.recording = False


def _autocast_without_cache(call: Call) -> contextlib.AbstractContextManager[Any]:
    """The caller's autocast; its cache of converted weights would be gone when a graph looks for it."""
    kind = call.tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
