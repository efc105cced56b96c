"""`optimize(cuda_graphs=True)` on a GPU: the capture itself."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

import fastvit
from fastvit.adapters.compare import tensors
from tests import nasty
from tests.adapters import zoo
from tests.adapters.graphing import (
    CHANGES,
    COUPLED,
    GPU,
    NOT_GRAPHED,
    Head,
    counts,
    graphed,
    needs_extension,
    run,
    told,
)
from tests.tolerances import relative_l2

pytestmark = [needs_extension, pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")]


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


# An optimizer's step takes images on the CPU.
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "an optimizer's step"])
def test_cuda_changes_take_effect_at_once(name):
    change, keeps = CHANGES[name]
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


def test_cuda_autocast():
    model = zoo.make("timm vit").cuda()
    x = zoo.image(model, batch=2).cuda()
    twin = fastvit.optimize(copy.deepcopy(model))
    fastvit.optimize(model, cuda_graphs=True)
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            assert relative_l2(run(model, x), run(twin, x)) < 2e-2
    assert counts(model).served == 3, told(model)


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
