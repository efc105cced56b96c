"""What the tests of CUDA graphs share: a recorder that needs no GPU, forwards of all kinds, and changes of a model."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastvit
from fastvit.adapters import graphs
from fastvit.ops import _backend
from tests import nasty
from tests.adapters import zoo

needs_extension = pytest.mark.skipif(_backend.extension() is None, reason="needs the C++ extension")

GPU = torch.cuda.is_available()
SIDE = 32  # pixels of the zoo's images


class Tape(TorchDispatchMode):
    """Records what a CUDA graph would: operators, and the memory that they read and write, but no Python."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = function(*args, **(kwargs or {}))
        # Detached, a tensor keeps its memory whatever happens to the parameter that it was.
        fixed = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        self.operators.append((function, *fixed, tree_map_only(torch.Tensor, torch.Tensor.detach, out)))
        return out

    def replay(self):
        with torch.inference_mode(False), torch.no_grad():
            for function, args, kwargs, out in self.operators:
                new = function(*args, **kwargs)
                if any(returned.alias_info is not None for returned in function._schema.returns):
                    continue  # a view, or written in place
                for mine, theirs in zip(*(o if isinstance(o, (tuple, list)) else [o] for o in (out, new)), strict=True):
                    if isinstance(mine, torch.Tensor):
                        mine.copy_(theirs)


class StandIn:
    """A recorder on the CPU, as blind as a CUDA graph."""

    device_type = "cpu"
    captures = 0
    replays = 0
    error: Exception | None = None

    def __init__(self, device):
        assert device.type == "cpu"
        self.turns = 0

    @staticmethod
    def is_capturing():
        return False

    @contextlib.contextmanager
    def turn(self):
        self.turns += 1
        assert self.turns == 1, "two turns at once"
        try:
            yield
        finally:
            self.turns -= 1

    def aside(self):
        return contextlib.nullcontext()

    def wait(self):
        assert self.turns == 0

    def capture(self, run):
        if self.error is not None:
            raise self.error
        type(self).captures += 1
        with Tape() as tape:
            outputs = run()

        def replay():
            type(self).replays += 1
            tape.replay()

        return outputs, replay


@pytest.fixture
def stand_in(monkeypatch):
    made = type("StandIn", (StandIn,), {})
    monkeypatch.setattr(graphs, "recorder_class", made)
    return made


@pytest.fixture
def vit():
    """A timm ViT and images (32, 3, 32, 32)."""
    model = zoo.make("timm vit")
    return model, zoo.image(model, batch=32)


def run(model, *args, **kwargs):
    with torch.inference_mode():
        return model(*args, **kwargs)


def graphed(model, *args, **kwargs):
    """The model with a graph for such calls."""
    fastvit.optimize(model, cuda_graphs=True)
    run(model, *args, **kwargs)
    run(model, *args, **kwargs)
    return model


def told(model):
    return fastvit.report(model).cuda_graphs[""]


def counts(model):
    return model.__dict__[graphs._KEY].told()


# ---- Forwards ------------------------------------------------------------------------------------


class Head(nn.Module):
    """A linear layer, and something around it."""

    def __init__(self, around):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.around = around

    def forward(self, x, *more):
        return self.around(self, self.fc(x), x, *more)


COUPLED = {
    "similarities": lambda m, y, x: y @ y.T,
    "loss": lambda m, y, x: (y, y.mean()),
    "centred": lambda m, y, x: y - y.mean(0),
    "scaled by the largest": lambda m, y, x: y / x.abs().max(),
    "a little of the others": lambda m, y, x: y + 1e-3 * y.mean(0),
    "a little of the largest": lambda m, y, x: y + 1e-3 * x.abs().max(),
    "divided by the batch": lambda m, y, x: y / len(y),
    "told the batch": lambda m, y, x: (y, len(y)),
    "as many colors as images": lambda m, y, x, color: y * color.sum(),
    "batch second": lambda m, y, x: y.T,
    "a list": lambda m, y, x: list(y.unbind()),
}


NOT_GRAPHED = {
    "random numbers": (lambda m, y, x: y + torch.rand(1), "its forward gives another result each time"),
    "an argument": (lambda m, y, x: x.view(x.shape), "an output shares memory with an argument or a weight"),
    "a weight": (lambda m, y, x: (y, m.fc.weight), "an output shares memory with an argument or a weight"),
    "writes its input": (lambda m, y, x: y + x.add_(1.0), "its forward writes into an argument"),
    "its own class": (lambda m, y, x: Row(y), "an output is Row"),
    "asks the GPU": (lambda m, y, x: y if y.sum().item() else -y, "capture failed: RuntimeError: operation not perm"),
    "raises when traced": (lambda m, y, x: y.missing if torch._C._len_torch_dispatch_stack() else y, "AttributeError"),
}


class Row:
    def __init__(self, y):
        self.y = y


# ---- Changes -------------------------------------------------------------------------------------


def square(model):
    return model.blocks[0].attn.proj.weight


def scale_in_place(model):
    with torch.no_grad():
        square(model).mul_(1.5)


def swap_parameter(model):
    model.head.weight = nn.Parameter(model.head.weight.detach() * 1.5)


def transpose_in_place(model):
    square(model).data = square(model).data.T


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3, SIDE, SIDE)).square().sum().backward()
    optimizer.step()
    model.zero_grad()


def patch_class(model):
    class Other(type(model.norm)):
        def forward(self, x):
            return -super().forward(x)

    model.norm.__class__ = Other


# (what happens, do the graphs that were captured before it still hold?)
CHANGES = {
    "in place": (scale_in_place, False),
    "in place, through data": (lambda m: m.head.weight.data.mul_(1.5), True),
    "other data": (lambda m: setattr(m.head.weight, "data", m.head.weight.data * 1.5), False),
    "other data in the same memory": (transpose_in_place, False),
    "another parameter": (swap_parameter, False),
    "load_state_dict": (lambda m: m.load_state_dict(nasty.randomize(zoo.timm()(), seed=5).state_dict()), False),
    "load_state_dict, assign": (
        lambda m: m.load_state_dict(nasty.randomize(zoo.timm()(), seed=5).state_dict(), assign=True),
        False,
    ),
    "an optimizer's step": (step, False),
    "another module": (lambda m: setattr(m, "head", nasty.randomize(nn.Linear(64, 3).eval(), seed=9)), False),
    "another module deep inside": (lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU().eval()), False),
    "a removed block": (lambda m: m.blocks.__delitem__(1), False),
    "a setting": (lambda m: setattr(m, "global_pool", "avg"), False),
    "another class": (patch_class, False),
    "another forward": (lambda m: setattr(m.head, "forward", lambda x: -x), False),
}
