"""What is measured against each other in benchmarks/ computes the same, and the records are complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_linear_residual,
    bench_mlp,
    bench_model,
    bench_norm_linear,
    bench_patch_embed,
    bench_pool,
    bench_self_attention,
    case,
    cpu,
    gpu,
    peers,
)
from tests.tolerances import relative_l2

OPERATORS = (
    bench_patch_embed,
    bench_norm_linear,
    bench_attention,
    bench_linear_residual,
    bench_self_attention,
    bench_mlp,
    bench_pool,
)

ROOT = Path(__file__).parents[2]
TINY = gpu.TINY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m in OPERATORS for name in m.NAMES], ids=lambda v: getattr(v, "__name__", str(v))
)
def test_both_sides_compute_the_same(module, name, dtype):
    if module is bench_attention:
        name = 19
    c = module.case(name, dtype, 2, width=TINY)
    row = case.measure(c, seconds=1e-3)
    assert row.passed, row
    assert row.speedup > 0
    assert row.limit in ("arithmetic", "memory")
    assert row.fraction_of_limit > 0
    assert c.flops > 0
    output = c.fused(*c.tensors)
    # Inputs and output cross the bus; what only the eager side reads does not count.
    assert c.bytes >= output.numel() * output.element_size()


def test_a_model_is_measured():
    pytest.importorskip("timm")
    c = bench_model.case("vit_tiny_patch16_224", torch.float32, 1)
    assert c.expected().dtype == torch.float64
    assert c.flops > 2e9
    row = case.measure(c, seconds=1e-3)
    assert row.passed, row


def test_the_runner_writes_its_records(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cpu, "BATCHES", (1,))
    monkeypatch.setattr(sys, "argv", ["cpu", "--only", "pool", "--seconds", "0.001", "--output", str(tmp_path)])
    assert cpu.main() == 0
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert [r["dtype"] for r in record["rows"]] == ["f32", "f32", "bf16", "bf16"]
    assert record["environment"]["versions"]["torch"]
    assert (tmp_path / "cpu.png").stat().st_size > 5000
    assert (tmp_path / "cpu-roofline.png").stat().st_size > 5000
    assert capsys.readouterr().out.count(" % of ") == 4


def test_peers_are_measured_or_left_out_with_a_line(monkeypatch, tmp_path, capsys):
    pytest.importorskip("timm")
    monkeypatch.setattr(cpu, "BATCHES", (1,))
    monkeypatch.setattr(bench_model, "NAMES", ("vit_tiny_patch16_224",))
    monkeypatch.setattr(cpu, "missing", lambda peer: "openvino is not installed" if peer == "openvino" else None)
    monkeypatch.setitem(peers.PEERS, "compile", lambda model, image: model)
    command = ["cpu", "--only", "model", "--seconds", "0.001", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--peers", "compile", "openvino"])
    assert cpu.main() == 0
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert all(list(row["peer_milliseconds"]) == ["compile"] for row in rows)
    output = capsys.readouterr().out
    assert "left out: openvino: openvino is not installed" in output
    assert output.count("  compile ") == 2


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_peer_computes_the_same(name):
    if reason := peers.missing(name):
        pytest.skip(reason)
    c = bench_model.case("vit_tiny_patch16_224", torch.float32, 1, peers=[name])
    with torch.inference_mode():
        expected, actual = c.eager(*c.tensors), c.peers[name](*c.tensors)
    assert relative_l2(actual, expected) < 1e-4


def test_a_wrong_kernel_fails_its_benchmark():
    c = bench_pool.case("token", torch.float32, 1, width=TINY)
    wrong = case.Case(c.operator, c.name, c.eager, lambda *t: c.fused(*t) * 1.001, c.tensors, c.flops, c.bytes)
    assert not case.measure(wrong, seconds=1e-3).passed


@pytest.mark.slow
def test_the_gpu_script_runs_dry(tmp_path):
    """Every step of `python -m benchmarks.gpu`, in the interpreter; a second run has nothing left to do."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--no-compile", "--output", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {key.split(":")[0] for key in record["steps"]} == set(gpu.GROUPS)
    assert all(step["status"] == "ok" for step in record["steps"].values())
    assert all(step.get("passed", True) for step in record["steps"].values())
    training = next(step for key, step in record["steps"].items() if key.startswith("training"))
    assert all(error < 1e-4 for error in training["gradient_errors"].values())
    assert (tmp_path / "gpu.png").stat().st_size > 5000
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stdout.strip().startswith("dry run")  # the table alone
    assert json.loads((tmp_path / "gpu.json").read_text()) == record


def test_tuning_runs_dry(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "choices.json"
    command = [sys.executable, "-m", "benchmarks.tune", "--dry-run", "--output", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout and "wrong" not in done.stdout
    for schedule in ("normalising", "folded", "persistent", "product", "cublas"):
        assert schedule in done.stdout
    measured = json.loads(path.read_text())["sm90"]
    assert [list(buckets) for buckets in measured.values()] == [["6"], ["6"]]


def test_a_failing_gpu_step_is_recorded_and_the_next_one_runs(tmp_path):
    run = gpu.Run("cpu", torch.float32, time.time() + 60, tmp_path / "gpu.json", True, False, {"steps": {}})

    def fail(run):
        raise RuntimeError("no such kernel\nand more")

    assert gpu.execute(run, gpu.Step("models", "bad", fail))
    assert gpu.execute(run, gpu.Step("models", "good", lambda run: {"tflops": 1.0}))
    steps = json.loads(run.path.read_text())["steps"]
    assert steps["models: bad"]["error"] == "RuntimeError: no such kernel\nand more"
    assert steps["models: good"]["status"] == "ok"
    assert "FAILED  RuntimeError: no such kernel" in gpu.summary("models: bad", steps["models: bad"])
