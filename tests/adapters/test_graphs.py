"""`optimize(cuda_graphs=True)` without a GPU: everything but the capture itself."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn

import fastvit
from fastvit.adapters import capture, graphs
from fastvit.adapters.compare import tensors
from fastvit.ops import _backend
from tests import nasty
from tests.adapters import graphing, zoo
from tests.adapters.graphing import COUPLED, GPU, NOT_GRAPHED, SIDE, Head, counts, graphed, needs_extension, run, told
from tests.tolerances import FLOAT32, assert_close, relative_l2

pytestmark = needs_extension
stand_in, vit = graphing.stand_in, graphing.vit


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
