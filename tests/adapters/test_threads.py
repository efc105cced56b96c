"""Optimized models under torch.set_num_threads, in DataLoader workers, after fork, and in several threads at once."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastvit
from fastvit._compat import import_timm
from fastvit.adapters.compare import tensors
from fastvit.ops import _backend
from tests.adapters import zoo
from tests.tolerances import FLOAT32, relative_l2

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason="needs the C++ extension")

import_timm()  # here, so that a spawned worker has it before it unpickles a model: see fastvit._compat

PATIENCE = 120.0  # seconds, after which what should have come will not
FAMILIES = ("timm vit layer scale", "timm vit swiglu", "timm head dim 72", "timm dinov2")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(model, x):
    with torch.inference_mode():
        return next(iter(tensors(model(x)).values())).clone()


def optimized(name):
    """(model, images, what the original makes of them in float64)."""
    model = zoo.make(name)
    x = zoo.image(model, batch=3)
    truth = run(zoo.make(name).double(), x.double())
    assert fastvit.report(fastvit.optimize(model)).replaced
    return model, x, truth


def most_threads(work):
    leased = _backend.extension().leased_threads
    leased()
    work()
    return leased()["most"]


def test_set_num_threads_takes_effect_at_once():
    model, x, truth = optimized("timm vit layer scale")
    x_tokens, outputs = torch.randn(3, 17, 64), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        assert most_threads(lambda: outputs.append(run(model.blocks, x_tokens))) == threads
        assert relative_l2(run(model, x), truth) <= FLOAT32
    assert all(torch.equal(outputs[0], y) for y in outputs[1:])


class Encoded(Dataset):
    """Images as a model sees them: each is run in the worker that loads it."""

    def __init__(self, model, images):
        self.model, self.images = model, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return run(self.model, self.images[i : i + 1])[0]


class Collate:
    """The same a batch at a time, with the threads that a user may give a worker."""

    def __init__(self, model, threads):
        self.model, self.threads = model, threads

    def __call__(self, images):
        torch.set_num_threads(self.threads)
        return run(self.model, torch.stack(images))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_the_workers_of_a_data_loader(start):
    model, x, truth = optimized("timm vit layer scale")
    assert relative_l2(run(model, x), truth) <= FLOAT32  # both pools are running when the workers start
    options = {"num_workers": 2, "multiprocessing_context": start, "timeout": PATIENCE}
    items = torch.cat(list(DataLoader(Encoded(model, x), batch_size=1, **options)))
    assert relative_l2(items, truth) <= FLOAT32
    if start == "fork":
        batches = list(DataLoader(x, batch_size=2, collate_fn=Collate(model, 2), **options))
        assert relative_l2(torch.cat(batches), truth) <= FLOAT32


def child(connection, model, x):
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            connection.send(run(model, x).tolist())
    except BaseException as error:  # the parent tells what it was
        connection.send(repr(error))


def test_after_fork():
    model, x, truth = optimized("timm vit layer scale")
    run(model, x)
    context = multiprocessing.get_context("fork")
    processes = []
    try:
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=child, args=(theirs, model, x))
            process.start()
            processes.append((process, ours))
        for _, ours in processes:
            for _ in range(2):
                assert ours.poll(PATIENCE), "the child hangs"
                assert relative_l2(torch.tensor(ours.recv()), truth) <= FLOAT32
    finally:
        for process, _ in processes:
            process.kill()
            process.join()
    assert relative_l2(run(model, x), truth) <= FLOAT32


def test_several_models_in_several_threads_at_once():
    cases = [optimized(name) for name in FAMILIES]
    start, errors = threading.Barrier(len(cases), timeout=PATIENCE), []

    def work(model, x, truth):
        start.wait()
        errors.extend(relative_l2(run(model, x), truth) for _ in range(10))

    def together():
        workers = [threading.Thread(target=work, args=case, daemon=True) for case in cases]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE)
            assert not worker.is_alive(), "the threads wait for each other"

    most = most_threads(together)
    assert len(errors) == 10 * len(cases)
    assert max(errors) <= FLOAT32
    # The first call takes both threads, and each of the others has its own.
    assert 2 <= most <= 2 + len(cases) - 1
    assert _backend.extension().leased_threads()["now"] == 0


def test_one_model_in_several_threads_at_once():
    model, x, truth = optimized("timm vit layer scale")
    expected, wrong = run(model, x), []
    assert relative_l2(expected, truth) <= FLOAT32

    def work():
        # A product's rows don't depend on the threads that it got.
        wrong.extend(i for i in range(10) if not torch.equal(run(model, x), expected))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive(), "the threads wait for each other"
    assert not wrong
