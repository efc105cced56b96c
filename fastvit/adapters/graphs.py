"""`optimize(cuda_graphs=True)`: a model's forward as CUDA graphs, for the latency of small batches.

At batch 1 a GPU waits for Python, which launches dozens of kernels.  A graph (`capture.py`) launches them all at once.
This is the bookkeeping: which graph serves a call, captured at the second call of its kind, and whether the model still
is what it was at the capture, which every call asks.  Whatever a graph can't stand for runs as it did before.
"""

from __future__ import annotations

import functools
import threading
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.adapters.capture import (
    TENSORS,
    Call,
    Coupled,
    CudaRecorder,
    Graph,
    NotGraphed,
    Recorder,
    call_obstacle,
    capture,
    is_recording,
    placement_obstacle,
    read_call,
)
from fastvit.adapters.prepared import _KEY as PREPARED
from fastvit.adapters.swap import with_made
from fastvit.nn._listeners import has_own_forward, listener_obstacle
from fastvit.ops import _backend

_MOST_GRAPHS = 32
# Kinds of calls that are remembered without a graph, such as images of ever new sizes.
_MOST_KINDS = 128

# On the model, so that copies and pickles of it keep the setting.
_KEY = "_fastvit_graphs"

# Most of what is on a module: none of it is a tensor or a configuration.
_BUILTIN = frozenset((type(None), bool, int, float, str, tuple, list, set, dict, OrderedDict))

# A test puts something in its place that needs no GPU.
recorder_class: type[Recorder] = CudaRecorder


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
        self.weights = tuple({id(t): t for t in (*weights, *(a for a in attributes if type(a) in TENSORS))}.values())
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
        self._snapshot = _backend.extension().Snapshot(
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
        if type(t) not in TENSORS or t.layout is not torch.strided:
            return f"a weight is {type(t).__name__}, not a plain tensor"
        if t.device != weights[0].device or t.device.type != device_type:
            return placement_obstacle(t, weights[0], device_type).replace("arguments", "weights")
    return listener_obstacle(modules[1:])


def _is_configuration(value: Any) -> bool:
    """Is this an object outside of the modules that a forward may go by, such as transformers' config?"""
    left_out = (nn.Module, Tensor, type, types.FunctionType, types.MethodType, types.ModuleType, Graphs)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, left_out)


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
        if is_recording() or recorder_class.is_capturing():
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
            padded = call.bucket > 1 and not kind.exact
            graph = capture(self._recorder, original, call, padded, self._seen.weights)
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
        with self._recorder.turn():
            return graph.answer(call.batch)

    def _drop(self) -> None:
        if self._recorder is not None:
            self._recorder.wait()  # what a replay still reads must not be given away
        self._recorder, self._seen, self._kinds = None, None, {}


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
