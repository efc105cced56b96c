"""`optimize(cuda_graphs=True)`: everything but the capture itself without a GPU, and the capture where there is one."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastvit
from fastvit.adapters import capture, graphs
from fastvit.adapters.compare import tensors
from fastvit.ops import _backend
from tests import nasty
from tests.adapters import zoo
from tests.tolerances import FLOAT32, assert_close, relative_l2

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason="needs the C++ extension")

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


# ---- Buckets and padding --------------------------------------------------------------------------


def test_buckets_are_ordered_and_waste_little():
    assert list(capture.BUCKETS) == sorted(set(capture.BUCKETS))
    smallest = {n: min(b for b in capture.BUCKETS if b >= n) for n in range(1, capture.BUCKETS[-1] + 1)}
    assert max(b / n for n, b in smallest.items()) < 1.5
    image = torch.zeros(5, 3, 2, 2)
    assert capture.read_call((image,), {}, "cpu").bucket == 6
    with pytest.raises(capture.NotGraphed, match="a batch above 32"):
        capture.read_call((torch.zeros(33, 3, 2, 2),), {}, "cpu")


@pytest.mark.parametrize("name", ["timm vit", "timm siglip", "hf vit", "hf clip", "torchvision vit"])
def test_outputs_of_every_batch_size(stand_in, name):
    model = zoo.make(name)
    twin = copy.deepcopy(fastvit.optimize(model))
    images = zoo.image(model, batch=7)
    graphed(model, images[:7])
    for batch in (7, 8, 7, 5, 5, 6, 1, 1, 1):
        x = torch.cat([images, images.flip(0)])[-batch:]
        expected, actual = run(twin, x), run(model, x)
        assert type(actual) is type(expected)
        expected, actual = tensors(expected), tensors(actual)
        assert expected.keys() == actual.keys()
        for key in expected:
            assert actual[key].shape == expected[key].shape
            assert relative_l2(actual[key], expected[key]) <= FLOAT32
    # A batch of 7 fills up the graph of 8, and 5 that of 6.
    assert counts(model).rows == [1, 6, 8]
    assert counts(model).reasons == {"the first call of its kind": 3}
    assert stand_in.captures == 3
    assert stand_in.replays == 3 + 3 + 1 + 1  # once at each capture, then once a call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(stand_in, vit, dtype):
    model, x = vit
    x = x[:3].to(dtype)
    truth = run(copy.deepcopy(model).to(dtype).double(), x.double())
    eager = run(copy.deepcopy(model).to(dtype), x)
    fastvit.optimize(model, dtype=dtype)
    assert_close(run(graphed(model, x), x), truth, eager=eager)
    assert stand_in.replays == 2


def test_padding_is_zero_again_after_a_larger_batch(stand_in, vit):
    model, x = vit
    graphed(model, x[:8])
    run(model, torch.full_like(x[:8], float("nan")))
    assert torch.isfinite(run(model, x[:7])).all()
    (kind,) = model.__dict__[graphs._KEY]._kinds.values()
    assert not kind.graph._inputs[0][7].any()


def test_outputs_are_the_callers_own(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    first = run(model, x[:2])
    kept = first.clone()
    second = run(model, x[2:4])
    assert torch.equal(first, kept)
    with torch.inference_mode():
        second.fill_(0.0)
    assert torch.equal(run(model, x[:2]), kept)
    with torch.no_grad():
        assert not model(x[:2]).is_inference()
    assert run(model, x[:2]).is_inference()


def test_one_tensor_in_two_places_stays_one(stand_in):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            y = self.fc(x)
            return {"a": y, "b": (y, None, 3)}

    model, x = Twice().eval(), torch.randn(2, 3)
    out = run(graphed(model, x), x)
    assert counts(model).served == 2
    assert out["a"] is out["b"][0]
    assert out["b"][1:] == (None, 3)


@pytest.mark.parametrize("kind", ["channels_last", "sliced", "expanded", "uint8"])
def test_strange_inputs_are_copied_in(stand_in, kind):
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=1, mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    x = torch.rand(4, 3, 32, 32, generator=nasty.generator())
    x = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: nasty.strided(x, "sliced"),
        "expanded": lambda: x[:1].expand(4, -1, -1, -1),
        "uint8": lambda: (255 * x).byte(),
    }[kind]()
    expected = run(model, x[:3])
    assert relative_l2(run(graphed(model, x[:3]), x[:3]), expected) <= FLOAT32
    assert counts(model).served == 2


# ---- Forwards that can't be padded, and worse -----------------------------------------------------


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


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("batch", [4, 5])  # as large as its bucket, and smaller
def test_images_that_influence_each_other_are_not_padded(stand_in, name, batch):
    model = nasty.randomize(Head(COUPLED[name])).eval()
    x = torch.linspace(2.0, 1.0, 6)[:, None] * nasty.tokens(6, 8).float()  # the first image has the largest values
    args = [(x[:n], *((torch.arange(1.0, n + 1),) if "colors" in name else ())) for n in (batch, batch - 1)]
    expected = [run(model, *a) for a in args]
    graphed(model, *args[0])
    assert counts(model).rows == [batch]
    for _ in range(3):
        for a, e in zip(args, expected, strict=True):
            actual = run(model, *a)
            assert type(actual) is type(e)
            for key, t in tensors(e).items():
                assert relative_l2(tensors(actual)[key], t) <= FLOAT32
    assert counts(model).rows == [batch - 1, batch]
    assert counts(model).served == 1 + 3 + 2


def test_images_without_content_prove_nothing_but_are_served(stand_in):
    model = Head(lambda m, y, x, ids: y + ids[:, None]).eval()
    ids = torch.zeros(3, dtype=torch.long)
    graphed(model, torch.zeros(3, 8), ids)
    assert counts(model).rows == [3]


def test_text_beside_images_is_not_taken_for_a_batch(stand_in):
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 136}
    vision = {**zoo.HF, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = nasty.randomize(transformers.CLIPModel(config)).eval()
    twin = copy.deepcopy(model)
    fastvit.optimize(model, cuda_graphs=True)
    for images, texts in ((3, 3), (3, 3), (2, 3), (2, 3), (3, 2), (3, 2), (3, 2)):
        inputs = {
            "input_ids": torch.randint(1, 99, (texts, 5), generator=nasty.generator()),
            "pixel_values": torch.randn(images, 3, SIDE, SIDE, generator=nasty.generator()),
        }
        expected, actual = tensors(run(twin, **inputs)), tensors(run(model, **inputs))
        for key in expected:
            assert actual[key].shape == expected[key].shape, key
            assert relative_l2(actual[key], expected[key]) < 1e-4, key
    assert counts(model).served == 4


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


@pytest.mark.parametrize("name", NOT_GRAPHED)
def test_what_no_graph_can_stand_for_runs_as_it_did(stand_in, name):
    around, reason = NOT_GRAPHED[name]
    model, twin = (nasty.randomize(Head(around)).eval() for _ in range(2))
    fastvit.optimize(model, cuda_graphs=True)
    x, y = torch.randn(4, 8), None
    for _ in range(4):
        y = x.clone()
        torch.manual_seed(0)
        actual = run(model, y)
    z = x.clone()
    torch.manual_seed(0)
    expected = run(twin, z)
    assert torch.equal(y, z)
    assert type(actual) is type(expected)
    if isinstance(actual, torch.Tensor):
        assert torch.equal(actual, expected)
    assert stand_in.replays == 0
    assert reason in told(model)
    assert counts(model).served == 0


def test_a_forward_that_changes_the_model(stand_in):
    def count(m, y, x):
        m.calls += 1
        return y * m.calls

    model = nasty.randomize(Head(count)).eval()
    model.calls = 0
    fastvit.optimize(model, cuda_graphs=True)
    x = torch.randn(2, 8)
    for expected in range(1, 5):
        assert relative_l2(run(model, x), expected * model.fc(x)) < 1e-6
    assert model.calls == 4
    assert stand_in.captures == 0


def test_a_failed_capture_leaves_the_model_working(stand_in, vit):
    model, x = vit
    expected = run(fastvit.optimize(model), x[:2])
    stand_in.error = torch.OutOfMemoryError("no memory is left\nand more")
    graphed(model, x[:2])
    assert torch.equal(run(model, x[:2]), expected)
    assert "0 captured, 0 calls served, 3 ran without: " in told(model)
    assert "2 x capture failed: OutOfMemoryError: no memory is left" in told(model)
    assert "and more" not in told(model)
    stand_in.error = None
    run(model, x[:2])
    assert stand_in.captures == 0  # nobody tries again and again
    run(model, x[:1])
    assert relative_l2(run(model, x[:1]), expected[:1]) <= FLOAT32
    assert counts(model).rows == [1]
    with torch.no_grad():
        model.head.bias.zero_()  # now there is a new model
    run(model, x[:2])
    run(model, x[:2])
    assert counts(model).rows == [2]


# ---- Changes --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", CHANGES)
def test_changes_take_effect_at_once(stand_in, vit, name):
    model, x = vit
    change, keeps = CHANGES[name]
    before = run(graphed(model, x[:3]), x[:3])
    change(model)
    twin = fastvit.restore(copy.deepcopy(model))
    if name == "another forward":
        twin.head.forward = lambda x: -x
    expected = run(twin, x[:3])
    assert before.shape != expected.shape or not torch.allclose(before, expected)
    replays, captures = stand_in.replays, stand_in.captures
    for _ in range(3):
        assert relative_l2(run(model, x[:3]), expected) <= FLOAT32
    if keeps:
        assert stand_in.captures == captures
        assert stand_in.replays == replays + 3
    elif name == "another forward":
        assert stand_in.captures == captures
        assert "forward of Linear was replaced" in told(model)
    else:
        assert stand_in.captures == captures + 1


def test_a_patched_class_takes_effect_at_once(stand_in, vit, monkeypatch):
    model, x = vit
    before = run(graphed(model, x[:2]), x[:2])
    own = type(fastvit.restore(copy.deepcopy(model)))
    for cls in (type(model.norm), type(model.blocks[0]).fastvit_original, own):
        forward = cls.forward
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", lambda self, x, forward=forward: -forward(self, x))
            assert not torch.allclose(run(model, x[:2]), before)
        for _ in range(2):
            assert torch.allclose(run(model, x[:2]), before)
        assert counts(model).rows == [2]


def test_a_changed_config_takes_effect_at_once(stand_in):
    model = zoo.make("hf clip")
    x = zoo.image(model)
    assert run(graphed(model, x), x).hidden_states is None
    model.config.output_hidden_states = True
    for _ in range(4):
        assert len(run(model, x).hidden_states) == 3
    assert counts(model).rows == [2]


def test_to_another_dtype_and_back(stand_in, vit):
    model, x = vit
    before = run(graphed(model, x[:2]), x[:2])
    assert run(model.double(), x[:2].double()).dtype == torch.float64
    assert run(model, x[:2].double()).dtype == torch.float64
    assert torch.equal(run(model.float(), x[:2]), before)


def test_hooks_inside_fire_and_go(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    calls = []
    for module in (model.blocks[0], model.norm, model.blocks[1].mlp.fc1):
        handle = module.register_forward_hook(lambda *a: calls.append(1))
        replays = stand_in.replays
        run(model, x[:2])
        assert len(calls) == 1
        assert stand_in.replays <= replays + 1  # one that was begun before the change was seen
        assert "forward hook on" in told(model)
        handle.remove()
        calls.clear()
        run(model, x[:2])
        run(model, x[:2])
        assert counts(model).rows == [2]


def test_hooks_on_the_model_itself_fire_at_every_call(stand_in, vit):
    model, x = vit
    model.register_forward_hook(lambda m, args, out: -out)
    expected = run(fastvit.optimize(model), x[:2])
    graphed(model, x[:2])
    assert relative_l2(run(model, x[:2]), expected) <= FLOAT32
    assert counts(model).served == 2


def test_weights_that_change_before_every_call_are_never_captured(stand_in, vit):
    model, x = vit
    fastvit.optimize(model, cuda_graphs=True)
    for _ in range(4):
        scale_in_place(model)
        run(model, x[:2])
    assert stand_in.captures == 0


# ---- Calls that run as before ---------------------------------------------------------------------


def test_training_mode_and_gradients_run_as_before(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    model(x[:2]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.train()
    run(model, x[:2])
    model.eval()
    model.blocks[1].train()
    run(model, x[:2])
    assert {"gradients are enabled", "training mode", "a module inside is in training mode"} <= set(
        counts(model).reasons
    )
    assert counts(model).served == 1


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m, x: m(x.to("meta")), "not on CPU"),
        (lambda m, x: m(torch.zeros(33, 3, SIDE, SIDE)), "a batch above 32"),
        (lambda m, x: m(x[:0]), "no batch among the arguments"),
        (lambda m, x: m(Marked(x)), "an argument is Marked"),
        (lambda m, x: m(x, attn_mask=object()), "an argument is object"),
        (lambda m, x: torch.func.vmap(lambda i: m(i[None])[0])(x), "torch.func transform"),
    ],
)
def test_strange_calls_run_as_before(stand_in, vit, call, reason):
    model, x = vit
    fastvit.optimize(model, cuda_graphs=True)
    for _ in range(2):
        with torch.no_grad(), contextlib.suppress(Exception):
            call(model, x[:2])
    assert counts(model).reasons == {reason: 2}
    assert stand_in.captures == 0


class Marked(torch.Tensor):
    pass


def test_bad_input_raises_as_before(stand_in, vit):
    model, x = vit
    fastvit.optimize(model, cuda_graphs=True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="channels"):
            run(model, x[:2, :2])


def test_modes_and_default_devices(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    with torch.device("cpu"):
        run(model, x[:2])
    assert counts(model).served == 2
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        run(model, x[:2])
    assert counts(model).reasons["a dispatch mode"] == 1


@pytest.mark.parametrize("name", ["timm vit", "hf dinov2"])
def test_autocast_is_part_of_the_kind(stand_in, name):
    model = zoo.make(name)
    x = zoo.image(model)
    plain = tensors(run(graphed(model, x), x))
    twin = fastvit.restore(copy.deepcopy(model))
    truth = tensors(run(copy.deepcopy(twin).double(), x.double()))
    for _ in range(3):
        # A cache of weights lives as long as the context.
        with torch.autocast("cpu", torch.bfloat16):
            low, eager = tensors(run(model, x)), tensors(run(twin, x))
    for key in truth:
        assert low[key].dtype == eager[key].dtype
        assert relative_l2(low[key], truth[key]) <= 1.2 * relative_l2(eager[key], truth[key])
        assert torch.equal(tensors(run(model, x))[key], plain[key])
    assert counts(model).rows == [2, 2]


def test_autocasts_cache_of_weights_is_not_baked_in(stand_in, vit):
    model, x = vit
    fastvit.optimize(model, cuda_graphs=True)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            run(model, x[:2])
    model.head.weight.data.neg_()  # moves no version, so that the graph stays
    twin = fastvit.restore(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_l2(run(model, x[:2]), run(twin, x[:2])) < 2e-2
    assert stand_in.captures == 1


def test_settings_are_part_of_the_kind(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    for setting in (
        fastvit.ops.use_backend("reference"),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        with setting:
            run(model, x[:2])
    assert counts(model).reasons["the first call of its kind"] == 3


def test_other_arguments_are_another_kind(stand_in):
    model = zoo.make("hf vit")
    x = zoo.image(model)
    fastvit.optimize(model, cuda_graphs=True)
    for _ in range(3):
        assert run(model, x).hidden_states is None
        assert len(run(model, x, output_hidden_states=True).hidden_states) == 3
        assert isinstance(run(model, x, return_dict=False), tuple)
    assert len(counts(model).rows) == 3


def test_hidden_states_that_a_model_around_collects(stand_in):
    model = zoo.make("hf siglip")
    x = zoo.image(model)
    inner = next(m for path, m in model.named_modules() if path.endswith("encoder"))
    expected = tensors(run(copy.deepcopy(model), x, output_hidden_states=True))
    fastvit.optimize(inner, cuda_graphs=True)
    for _ in range(4):
        run(model, x)
    assert counts(inner).served > 0
    for _ in range(3):
        actual = tensors(run(model, x, output_hidden_states=True))
        assert actual.keys() == expected.keys()
        assert all(relative_l2(actual[key], expected[key]) <= FLOAT32 for key in expected)


# ---- Off and on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm vit", "hf vit", "torchvision vit"])
def test_restore_undoes_it_exactly(stand_in, name):
    model = zoo.make(name)
    x = zoo.image(model)
    expected = tensors(run(model, x))
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [set(m.__dict__) for m in model.modules()]
    graphed(model, x)
    assert isinstance(model, classes[0])
    assert type(model).__name__ == classes[0].__name__
    assert list(model.state_dict()) == list(state)
    fastvit.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) - {"_fastvit_prepared"} for m in model.modules()] == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    actual = tensors(run(model, x))
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
    assert fastvit.report(model).cuda_graphs == {}


def test_on_again_and_off(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    cls = type(model)
    fastvit.optimize(model, cuda_graphs=True)
    assert type(model) is cls
    run(model, x[:2])
    assert counts(model).served == 2
    assert stand_in.captures == 1
    fastvit.optimize(model)
    assert not graphs.is_graphed(model)
    assert fastvit.report(model).replaced
    graphed(model, x[:2])
    assert stand_in.captures == 2
    with pytest.raises(TypeError, match="cuda_graphs: 1 is not accepted"):
        fastvit.optimize(model, cuda_graphs=1)


def test_with_another_dtype_and_undone(stand_in, vit):
    model, x = vit
    before = run(model, x[:2])
    graphed(model, x[:2])
    fastvit.optimize(model, dtype=torch.bfloat16, cuda_graphs=True)
    assert run(graphed(model, x[:2].bfloat16()), x[:2].bfloat16()).dtype == torch.bfloat16
    assert torch.equal(run(fastvit.restore(model), x[:2]), before)


def test_int8_beneath(stand_in, vit):
    """The int8 form of a weight is a cache: a graph must not outlive it."""
    model, x = vit
    fastvit.optimize(model, quantize="int8", cuda_graphs=True)
    run(model, x[:2])
    before = run(model, x[:2])
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(0.5)
    after = run(model, x[:2])
    assert not torch.allclose(before, after)
    assert torch.equal(run(model, x[:2]), after)


def test_a_part_of_a_model(stand_in, vit):
    model, x = vit
    expected = run(fastvit.optimize(model), x[:2])
    fastvit.optimize(model.blocks, cuda_graphs=True)
    for _ in range(3):
        assert relative_l2(run(model, x[:2]), expected) <= FLOAT32
    assert "2 calls served" in fastvit.report(model).cuda_graphs["blocks"]
    fastvit.optimize(model, cuda_graphs=True)
    assert list(fastvit.report(model).cuda_graphs) == [""]
    fastvit.optimize(model.blocks[0], cuda_graphs=True)  # a block that is fused too, inside
    graphed_block = type(model.blocks[0])
    for _ in range(3):
        assert relative_l2(run(model, x[:2]), expected) <= FLOAT32
    assert type(model.blocks[0]) is graphed_block
    assert counts(model).rows == [2]
    fastvit.restore(model)
    assert not any(graphs.is_graphed(m) or m.__dict__.get(graphs._KEY) for m in model.modules())


def test_a_class_that_was_derived_since(stand_in, vit):
    """As FSDP2 and parametrize do."""
    model, x = vit
    original = type(model)
    fastvit.optimize(model, cuda_graphs=True)
    model.__class__ = type("Sharded", (type(model),), {"sharded": True})
    run(model, x[:2])
    fastvit.restore(model)
    assert model.sharded and issubclass(type(model), original)
    assert not graphs.is_graphed(model)


def test_a_failure_midway_leaves_the_graphs_on(stand_in, vit, monkeypatch):
    model, x = vit

    def broken(self, *args):
        raise MemoryError("no room")

    monkeypatch.setattr(type(model), "to", broken)
    graphed(model, x[:2])
    for setting in (True, False):
        with pytest.raises(MemoryError):
            fastvit.optimize(model, dtype=torch.bfloat16, cuda_graphs=setting)
    run(model, x[:2])
    assert counts(model).served == 2


def test_copies_and_pickles_begin_without_graphs(stand_in, vit):
    model, x = vit
    original = type(model)
    expected = run(graphed(model, x[:2]), x[:2])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(model, protocol=0)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in twins:
        assert type(twin) is type(model)
        assert counts(twin) == graphs.Counts()
        for _ in range(2):
            assert relative_l2(run(twin, x[:2]), expected) <= FLOAT32
        assert counts(twin).rows == [2]
        assert type(fastvit.restore(twin)) is original


def test_a_model_goes_when_nobody_holds_it(stand_in, vit):
    """What was seen of it makes no cycle that only the garbage collector would find."""
    model, x = vit
    model = graphed(copy.deepcopy(model), x[:2])
    run(model, x[:2])
    assert counts(model).served == 2
    weight = weakref.ref(model.head.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_other_peoples_programs(stand_in, vit):
    model, x = vit
    expected = run(fastvit.optimize(model), x[:2])
    graphed(model, x[:2])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_l2(compiled(x[:2]), expected) < 1e-5
    torch._dynamo.reset()
    with torch.no_grad():
        exported = torch.export.export(model, (x[:2],))
    assert sum("fastvit" in str(n.target) for n in exported.graph.nodes) == 5
    assert [n.name for n in exported.graph.nodes if n.name == "x"]
    assert relative_l2(torch.jit.trace(model, x[:2], check_trace=False)(x[:2]), expected) < 1e-5
    assert relative_l2(torch.jit.script(model)(x[:2]), expected) < 1e-5
    for _ in range(3):
        assert relative_l2(run(model, x[:2]), expected) < 1e-5
    assert counts(model).rows == [2]


def test_compare(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    cls = type(model)
    assert fastvit.compare(model, x[:2]).max_relative_l2 < 1e-5
    assert type(model) is cls
    run(model, x[:2])
    run(model, x[:2])
    assert counts(model).rows == [2]


# ---- Threads --------------------------------------------------------------------------------------


def test_several_threads_at_once(stand_in, vit):
    model, x = vit
    fastvit.optimize(model, cuda_graphs=True)
    twin = fastvit.optimize(copy.deepcopy(model))
    expected = {n: run(twin, x[:n]) for n in (1, 2, 4)}
    wrong, start = [], threading.Barrier(4, timeout=60.0)

    def work(seed):
        start.wait()
        for i in range(12):
            n = (1, 2, 4)[(seed + i) % 3]
            if not relative_l2(run(model, x[:n]), expected[n]) <= FLOAT32:
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60.0)
        assert not worker.is_alive()
    assert not wrong
    assert counts(model).rows == [1, 2, 4]
    assert stand_in.captures == 3
    assert counts(model).served == 4 * 12 - 3


# ---- The report, and no GPU -----------------------------------------------------------------------


def test_report(stand_in, vit):
    model, x = vit
    graphed(model, x[:3])
    run(model, x[:1])
    model(x[:1])
    expected = (
        "1 captured (batch 3), 1 calls served, 3 ran without: 2 x the first call of its kind, 1 x gradients are enabled"
    )
    assert told(model) == expected
    assert str(fastvit.report(model)).splitlines()[-1] == f"CUDA graphs of (model): {expected}"
    assert fastvit.report(model).to_dict()["cuda_graphs"] == {"": expected}
    model.forward = lambda x: x
    assert "its forward was replaced on the instance" in told(model)


def test_too_many_graphs_and_kinds(stand_in, vit, monkeypatch):
    model, x = vit
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 1)
    graphed(model, x[:1])
    for _ in range(2):
        run(model, x[:2])
    assert "1 x 1 graphs are captured already" in told(model)
    monkeypatch.setattr(graphs, "_MOST_KINDS", 4)
    with fastvit.ops.use_backend("reference"):
        for n in capture.BUCKETS[:6]:
            run(model, x[:n])
    assert len(model.__dict__[graphs._KEY]._kinds) <= 4
    run(model, x[:1])
    assert counts(model).rows == [1]


@pytest.mark.skipif(GPU, reason="without a GPU")
def test_without_a_gpu_nothing_changes(vit):
    model, x = vit
    expected = run(fastvit.optimize(model), x[:2])
    fastvit.optimize(model, cuda_graphs=True)
    assert told(model) == "0 captured, 0 calls served; not on CUDA"
    for _ in range(3):
        assert torch.equal(run(model, x[:2]), expected)
    assert told(model) == "0 captured, 0 calls served, 3 ran without: 3 x not on CUDA"


def test_without_the_extension(stand_in, vit, monkeypatch):
    model, x = vit
    monkeypatch.setattr(_backend, "extension", lambda: None)
    graphed(model, x[:2])
    assert "needs fastvit's C++ extension" in told(model)


# ---- On a GPU -------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["timm vit layer scale", "timm siglip", "hf vit", "hf dinov2", "torchvision vit"])
def test_cuda_outputs_of_every_batch_size(name, dtype):
    model = zoo.make(name).to("cuda", dtype)
    twin = copy.deepcopy(fastvit.optimize(model))
    images = zoo.image(model, batch=8).to("cuda", dtype)
    graphed(model, images[:7])
    kept = []
    for batch in (7, 8, 5, 5, 6, 1, 1, 1):
        actual = tensors(run(model, images[-batch:]))
        for key, expected in tensors(run(twin, images[-batch:])).items():
            kept.append((actual[key], expected))
    # Compared at the end: no output may have been written over.
    for actual, expected in kept:
        assert relative_l2(actual, expected) <= (1e-3 if dtype == torch.float32 else 2e-2)
    assert counts(model).rows == [1, 6, 8], told(model)


@needs_gpu
@pytest.mark.parametrize("name", CHANGES)
def test_cuda_changes_take_effect_at_once(name):
    change, keeps = CHANGES[name]
    if name == "an optimizer's step":
        pytest.skip("its images are on the CPU")
    model = zoo.make("timm vit")
    x = zoo.image(model, batch=3).cuda()
    graphed(model.cuda(), x)
    change(model)
    model.cuda()
    twin = fastvit.restore(copy.deepcopy(model))
    if name == "another forward":
        twin.head.forward = lambda x: -x
    for _ in range(3):
        assert relative_l2(run(model, x), run(twin, x)) < 1e-3, name
    assert counts(model).served == (4 if keeps else 1 if name == "another forward" else 3), told(model)


@needs_gpu
def test_cuda_autocast():
    model = zoo.make("timm vit").cuda()
    x = zoo.image(model, batch=2).cuda()
    twin = fastvit.optimize(copy.deepcopy(model))
    fastvit.optimize(model, cuda_graphs=True)
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            assert relative_l2(run(model, x), run(twin, x)) < 2e-2
    assert counts(model).served == 3, told(model)


@needs_gpu
def test_cuda_failed_capture():
    model = nasty.randomize(Head(NOT_GRAPHED["asks the GPU"][0])).eval().cuda()
    x = torch.randn(4, 8, device="cuda")
    expected, stream = run(model, x), torch.cuda.current_stream()
    graphed(model, x)
    assert torch.equal(run(model, x), expected)
    assert torch.cuda.current_stream() == stream
    assert "capture failed" in told(model)
    model.around = COUPLED["similarities"]
    for _ in range(3):
        y = model.fc(x)
        assert relative_l2(run(model, x), y @ y.T) < 1e-3
    assert counts(model).rows == [4], told(model)


@needs_gpu
def test_cuda_threads_with_streams_of_their_own():
    model = zoo.make("timm vit").cuda()
    x = zoo.image(model, batch=4).cuda()
    twin = fastvit.optimize(copy.deepcopy(model))
    fastvit.optimize(model, cuda_graphs=True)
    expected = {n: run(twin, x[:n]) for n in (1, 2, 4)}
    torch.cuda.synchronize()
    wrong = []

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(30):
                n = (1, 2, 4)[(seed + i) % 3]
                if not relative_l2(run(model, x[:n]), expected[n]) < 1e-3:
                    wrong.append(n)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120.0)
        assert not worker.is_alive()
    assert not wrong
    assert counts(model).rows == [1, 2, 4], told(model)


@needs_gpu
def test_cuda_memory_goes_with_the_model():
    model = zoo.make("timm vit").cuda()
    x = zoo.image(model, batch=4).cuda()
    graphed(model, x)
    weight = weakref.ref(model.head.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()
