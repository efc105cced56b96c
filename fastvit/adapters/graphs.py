"""`optimize(cuda_graphs=True)`: a model's forward as CUDA graphs, for the latency of small batches.

At batch 1 a GPU waits for Python, which launches dozens of kernels.  A graph launches them all at once, but is blind:
it has the shapes, addresses, settings and Python of one call baked in.  So there is a graph for each kind of call and
each bucket of batch sizes, captured at the second call of its kind, and every call compares the model with what it was
at the capture.  Whatever a graph can't stand for runs as it did before.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree
from torch.utils._device import DeviceContext

from fastvit.adapters.parts import mode_obstacle
from fastvit.adapters.prepared import _KEY as PREPARED
from fastvit.adapters.swap import with_made
from fastvit.nn._listeners import has_own_forward, listener_obstacle
from fastvit.ops import _backend

# A batch runs in the next bucket.  Above the last one a GPU has more to do than Python to launch; between powers of two
# lie the halves, so that a batch of five does not cost as much as one of eight.
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

_MOST_GRAPHS = 32
# Kinds of calls that are remembered without a graph, such as images of ever new sizes.
_MOST_KINDS = 128

# A row of a batch and the same row alone go through other kernels, and differ by their rounding.
_ROUNDING = 0.05

# On the model, so that copies and pickles of it keep the setting.
_KEY = "_fastvit_graphs"

_PLAIN = (Tensor, nn.Parameter)
_CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
# Most of what is on a module: none of it is a tensor or a configuration.
_BUILTIN = frozenset((type(None), bool, int, float, str, tuple, list, set, dict, OrderedDict))
_LEAVES = frozenset((*_PLAIN, *_CONSTANTS))


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


# A test puts something in its place that needs no GPU.
recorder_class: type[Recorder] = CudaRecorder


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
        leaves = [next(given) if type(leaf) in _PLAIN else leaf for leaf in leaves]
        return _pytree.tree_unflatten(leaves, spec)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str) -> Call:
    """Raises NotGraphed for arguments that can't be kept in a graph."""
    leaves: list[Any] = [*args, *kwargs.values()]
    structure: Any = (len(args), *kwargs)
    if not _LEAVES.issuperset(map(type, leaves)):
        leaves, structure = _pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if type(leaf) in _PLAIN]
    batch = next((t.shape[0] for t in tensors if t.ndim), 0)
    follows = [t.ndim > 0 and t.shape[0] == batch for t in tensors]
    key: list[Any] = [structure]
    tensor = 0
    for leaf in leaves:
        kind = type(leaf)
        if kind in _PLAIN:
            if leaf.device != tensors[0].device or leaf.device.type != device_type or leaf.layout is not torch.strided:
                raise NotGraphed(_where(leaf, tensors[0], device_type))
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


def _where(tensor: Tensor, first: Tensor, device_type: str) -> str:
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


# ---- The model -------------------------------------------------------------------------------------


class Fingerprint:
    """A model as it was: its modules with their types, attributes and hooks, its tensors, and objects it is set up by.

    Watched are a tensor's memory and version.  What is written through `.data` moves no version, and needs none: a
    graph reads the weights anew.
    """

    def __init__(self, model: nn.Module, device_type: str) -> None:
        modules = list(model.modules())
        weights = [*model.parameters(), *model.buffers()]
        self.obstacle = _model_obstacle(modules, weights, device_type)
        self._collectors: list[Any] = []
        if self.obstacle is not None:
            return
        attributes = [value for m in modules for value in vars(m).values() if type(value) not in _BUILTIN]
        self.weights = tuple({id(t): t for t in (*weights, *(a for a in attributes if type(a) in _PLAIN))}.values())
        hooks = [hook for m in modules for hook in m._forward_hooks.values()]
        found = [getattr(hook, "__globals__", {}).get("_active_collector") for hook in hooks]
        self._collectors = list({id(c): c for c in found if c is not None}.values())
        self._versioned = [t for t in self.weights if not t.is_inference()]
        self._memory = self._read_memory()
        self._rest = self._read_rest()
        registry = torch.nn.modules.module
        dicts = [
            registry._global_forward_hooks,
            registry._global_forward_pre_hooks,
            registry._global_backward_hooks,
            registry._global_backward_pre_hooks,
            *{id(a): vars(a) for a in attributes if _is_configuration(a)}.values(),
        ]
        # A fused class asks for its original's forward, too.
        kinds: set[Any] = {
            kind for cls in {type(m) for m in modules} for kind in cls.__mro__ if "forward" in vars(kind)
        }
        kept: list[Any] = []
        self._snapshot = _backend.extension().Snapshot(  # type: ignore[union-attr]
            modules, dicts, [(kind, kind.forward) for kind in kinds], PREPARED, kept
        )
        # What the model owns and is owned by would keep it alive.
        self._kept = [value for value in kept if type(value) is not Graphs]

    def is_in_place(self) -> bool:
        """Is all memory that a graph reads still what it was?  If so a replay does no harm, right or wrong."""
        return self.obstacle is not None or self._read_memory() == self._memory

    def holds(self, model: nn.Module) -> bool:
        """Is everything as it was?"""
        return self.obstacle is None and self._read_rest() == self._rest and bool(self._snapshot.holds(model))

    def is_recorded(self) -> bool:
        """Does a model around this one collect what happens inside, as transformers do for output_hidden_states?"""
        return any(collector.get() is not None for collector in self._collectors)

    # Hundreds of tensors at every call: each of these is one loop in C.

    def _read_memory(self) -> list[Any]:
        return [*map(_data_ptr, self.weights), *map(_shape, self.weights)]

    def _read_rest(self) -> list[Any]:
        return [*map(_version, self._versioned), *map(_dtype, self.weights), *map(_stride, self.weights)]


_data_ptr, _stride = Tensor.data_ptr, Tensor.stride
_shape, _version, _dtype = (getattr(Tensor, name).__get__ for name in ("shape", "_version", "dtype"))


def _model_obstacle(modules: list[nn.Module], weights: list[Tensor], device_type: str) -> str | None:
    if _backend.extension() is None:
        return "needs fastvit's C++ extension, which watches the model"
    if any(m.training for m in modules):
        return "a module inside is in training mode"
    if not weights:
        return "a model without weights"
    for t in weights:
        if type(t) not in _PLAIN or t.layout is not torch.strided:
            return f"a weight is {type(t).__name__}, not a plain tensor"
        if t.device != weights[0].device or t.device.type != device_type:
            return _where(t, weights[0], device_type).replace("arguments", "weights")
    return listener_obstacle(modules[1:])


def _is_configuration(value: Any) -> bool:
    """Is this an object outside of the modules that a forward may go by, such as transformers' config?"""
    left_out = (nn.Module, Tensor, type, types.FunctionType, types.MethodType, types.ModuleType, Graphs)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, left_out)


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
        if type(value) in _PLAIN:
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


# ---- The graphs of a model -------------------------------------------------------------------------


@dataclass
class Kind:
    """Calls that one graph can serve, and what has become of it."""

    calls: int = 0
    graph: Graph | None = None
    obstacle: str | None = None
    exact: bool = False  # for one size of a batch, which is not padded
    coupled: bool = False  # padding has proved wrong: this bucket's batches have kinds of their own


@dataclass
class Counts:
    """For the report: calls that a graph served, others by the reason, and graphs captured by their number of rows."""

    served: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    rows: list[int] = field(default_factory=list)


# Is this thread warming up or capturing?  Then a graphed model inside of the model runs as it is.
_here = threading.local()


class Graphs:
    """A model's graphs, and what they are true for.  It knows no model: copies of one begin with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recorder: Recorder | None = None
        self._seen: Fingerprint | None = None
        self._kinds: dict[Any, Kind] = {}
        self._counts = Counts()

    def __reduce__(self) -> Any:
        return Graphs, ()

    def run(self, model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """original(*args, **kwargs), from a graph where one can stand for it."""
        if getattr(_here, "recording", False) or recorder_class.is_capturing():
            return original(*args, **kwargs)
        try:
            if obstacle := call_obstacle(model):
                raise NotGraphed(obstacle)
            call = read_call(args, kwargs, recorder_class.device_type)
            with self._lock:
                return self._serve(model, original, call)
        except NotGraphed as reason:
            with self._lock:
                self._counts.reasons[str(reason)] += 1
        return original(*args, **kwargs)

    def drop(self) -> None:
        """Free all graphs."""
        with self._lock:
            self._drop()

    def told(self) -> Counts:
        """How it went so far, and what is captured now."""
        with self._lock:
            rows = sorted(kind.graph.rows for kind in self._kinds.values() if kind.graph is not None)
            return Counts(self._counts.served, Counter(self._counts.reasons), rows)

    def _serve(self, model: nn.Module, original: Callable[..., Any], call: Call) -> Any:
        if self._seen is not None and self._seen.is_recorded():
            raise NotGraphed("a model around it collects its hidden states")
        if self._seen is not None and not self._seen.is_in_place():
            self._drop()
        graph = self._kind(call).graph
        if graph is not None:
            assert self._recorder is not None
            with self._recorder.turn():
                result = graph.run(call)
            # The GPU is busy by now, so that looking at the whole model costs no time.
            if self._seen is not None and self._seen.holds(model):
                self._counts.served += 1
                return result
            self._drop()
        elif self._seen is not None and not self._seen.holds(model):
            self._drop()
        if self._seen is None:
            self._seen = Fingerprint(model, recorder_class.device_type)
        if self._seen.obstacle is not None:
            raise NotGraphed(self._seen.obstacle)
        if call.tensors[0].device != self._seen.weights[0].device:
            raise NotGraphed(f"arguments on {call.tensors[0].device}, weights on {self._seen.weights[0].device}")
        kind = self._kind(call)
        kind.calls += 1
        if kind.obstacle is not None:
            raise NotGraphed(kind.obstacle)
        if kind.calls < 2:
            # Weights that change before every call would be captured for nothing.
            raise NotGraphed("the first call of its kind")
        result = self._record(model, original, call, kind)
        self._counts.served += 1
        return result

    def _kind(self, call: Call) -> Kind:
        """What is known of such calls."""
        kind = self._kinds.get((call.key, call.bucket))
        if kind is None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds = {key: kind for key, kind in self._kinds.items() if kind.graph is not None}
            kind = self._kinds[call.key, call.bucket] = Kind()
        if kind.coupled:
            kind = self._kinds.setdefault((call.key, call.bucket, call.batch), Kind(exact=True))
        return kind

    def _record(self, model: nn.Module, original: Callable[..., Any], call: Call, kind: Kind) -> Any:
        assert self._seen is not None
        if sum(k.graph is not None for k in self._kinds.values()) >= _MOST_GRAPHS:
            raise NotGraphed(f"{_MOST_GRAPHS} graphs are captured already")
        if self._recorder is None:
            self._recorder = recorder_class(call.tensors[0].device)
        try:
            graph = self._recorded(original, call, padded=call.bucket > 1 and not kind.exact)
        except Coupled:
            kind.coupled = True
            return self._record(model, original, call, self._kind(call))
        except Exception as error:
            # A pool of memory that no graph has is gone for good.
            if all(k.graph is None for k in self._kinds.values()):
                self._recorder = None
            told = str(error) if isinstance(error, NotGraphed) else f"capture failed: {_short(error)}"
            kind.obstacle = told
            raise NotGraphed(told) from None
        if not (self._seen.is_in_place() and self._seen.holds(model)):
            self._drop()
            raise NotGraphed("its forward changes the model")
        kind.graph = graph
        with self._turn():
            return graph.answer(call.batch)

    def _recorded(self, original: Callable[..., Any], call: Call, padded: bool) -> Graph:
        assert self._recorder is not None and self._seen is not None
        _here.recording = True
        try:
            # Not inference tensors: the graph's own outlive the mode.
            with torch.inference_mode(False), torch.no_grad(), _autocast_without_cache(call), self._turn():
                graph = Graph(call, padded)
                graph.record(self._recorder, original, call, self._seen.weights)
                return graph
        finally:
            _here.recording = False

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        assert self._recorder is not None
        return self._recorder.turn()

    def _drop(self) -> None:
        if self._recorder is not None:
            self._recorder.wait()  # what a replay still reads must not be given away
        self._recorder, self._seen, self._kinds = None, None, {}


def _autocast_without_cache(call: Call) -> contextlib.AbstractContextManager[Any]:
    """The caller's autocast; its cache of converted weights would be gone when a graph looks for it."""
    kind = call.tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# ---- The swap --------------------------------------------------------------------------------------


class Graphed:
    """Mixin of a class whose forward goes by graphs; `_graphed_class` makes it."""

    fastvit_ungraphed: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *rest = tuple(super().__reduce_ex__(protocol))
        # Pickle looks classes up by name, and the made class shares another's.
        arguments = tuple(self.fastvit_ungraphed if a is type(self) else a for a in arguments)
        return _rebuild, (function, arguments), *rest

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the original's source."""
        twin = self.fastvit_ungraphed.__new__(self.fastvit_ungraphed)
        twin.__dict__.update(self.__dict__)
        twin.__dict__.pop(_KEY, None)
        prepare = getattr(twin, "__prepare_scriptable__", None)
        return twin if prepare is None else prepare()


def _rebuild(function: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = function(*arguments)
    module.__class__ = _graphed_class(type(module))  # type: ignore[arg-type]
    return module


@functools.cache
def _graphed_class(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        return self.__dict__[_KEY].run(self, functools.partial(base.forward, self), args, kwargs)

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "fastvit_ungraphed": base,
        "forward": forward,
    }
    return type(base.__name__, (Graphed, base), namespace)


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class whose forward a graph stands for."""
    return with_made(cls, "fastvit_ungraphed", lambda made: made.fastvit_ungraphed) if issubclass(cls, Graphed) else cls


def is_graphed(module: Any) -> bool:
    return isinstance(module, Graphed)


def swap_graphs_in(model: nn.Module, graphs: Graphs) -> None:
    if has_own_forward(model):
        model.__dict__.pop("forward", None)
    model.__class__ = _graphed_class(type(model))  # type: ignore[arg-type]
    model.__dict__[_KEY] = graphs


def swap_graphs_out(module: nn.Module) -> Graphs | None:
    """The module as it was before; returns its graphs, if it had any."""
    if not is_graphed(module):
        return None
    if has_own_forward(module):
        module.__dict__.pop("forward", None)
    module.__class__ = original_class(type(module))
    graphs: Graphs = module.__dict__.pop(_KEY)
    return graphs


def graphs_sentence(model: nn.Module) -> str:
    """How a graphed model's calls went, for the report."""
    counts = model.__dict__[_KEY].told()
    sentence = f"{len(counts.rows)} captured"
    if counts.rows:
        sentence += f" (batch {', '.join(map(str, counts.rows))})"
    sentence += f", {counts.served} calls served"
    reasons = dict(counts.reasons.most_common())
    parameter = next(model.parameters(), None)
    if not has_own_forward(model):
        sentence += "; its forward was replaced on the instance"
    elif not reasons and parameter is not None and parameter.device.type != recorder_class.device_type:
        sentence += f"; not on {recorder_class.device_type.upper()}"
    if reasons:
        told = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        sentence += f", {sum(reasons.values())} ran without: {told}"
    return sentence
