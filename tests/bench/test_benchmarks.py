"""What is measured against each other in benchmarks/ computes the same, and the records are complete."""

from __future__ import annotations

import dataclasses
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
    plots,
    summary,
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
    ("module", "name"),
    [(m, name) for m in OPERATORS for name in (m.NAMES if m is not bench_attention else (19,))],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_both_sides_compute_the_same(module, name, dtype):
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


ROW = case.Row(
    operator="model",
    name="vit_base_patch16_224, batch 8",
    dtype="f32",
    pairs=5,
    eager_milliseconds=30.0,
    fastvit_milliseconds=10.0,
    speedup=3.0,
    limit="arithmetic",
    fraction_of_limit=0.9,
    eager_error=1e-7,
    fastvit_error=1e-7,
    flops=9 * 10**9,
    bytes=10**8,
    peak=1e12,
    bandwidth=3e10,
)


def test_a_model_is_judged_by_its_first_samples():
    pytest.importorskip("timm")
    c = bench_model.case("vit_tiny_patch16_224", torch.float32, 3)
    assert len(c.expected()) == 2
    mixed = dataclasses.replace(c, fused=lambda x: c.fused(x).flip(0), flops=1)
    assert not case.measure(mixed, seconds=1e-3).passed


def test_attention_stands_beside_the_fastest_layout_of_sdpa():
    c = bench_attention.case((197, 72), torch.float32, 1)
    (qkv,) = c.tensors
    assert c.name == "16 heads of 72, 197 tokens, batch 1"
    assert c.flops == 4 * 197 * 197 * 16 * 72
    with torch.inference_mode():
        contiguous = c.peers["SDPA, contiguous"](qkv)
        assert relative_l2(contiguous.transpose(1, 2).flatten(2), c.eager(qkv)) < 1e-6
    row = dataclasses.replace(
        ROW, operator="attention", speedup=1.6, peer_speedups={"SDPA, contiguous": 1.2, "other": 0.5}
    )
    assert [v.value for v in summary.judge([row]) if "SDPA" in v.goal.text] == [1.2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_memory_of_attention_is_measured(monkeypatch):
    extra = bench_attention.extra_bytes((577, 80), torch.float32, 1)
    if extra is None:
        pytest.skip("the peak of resident memory can't be reset here")
    # Far from the 21 MB that the scores of 16 heads take.
    assert 0 < extra < 10 * bench_attention.scores_bytes((577, 80))


def test_memory_that_a_call_takes_is_seen(monkeypatch):
    """A call that does write a matrix of scores is found out."""

    class Ends:
        sent = None

        def send(self, value):
            self.sent = value

    def materialised(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    c = bench_attention.case((1370, 64), torch.float32, 1)
    monkeypatch.setattr(bench_attention, "case", lambda *_: dataclasses.replace(c, fused=materialised))
    ends = Ends()
    bench_attention._grow(ends, (1370, 64), torch.float32, 1, torch.get_num_threads())
    if ends.sent is None:
        pytest.skip("the peak of resident memory can't be reset here")
    assert ends.sent > 10 * bench_attention.scores_bytes((1370, 64))


def test_quick_leaves_out_what_takes_minutes():
    everything, quick = ({str(s) for s in cpu.steps(None, quick)} for quick in (False, True))
    left_out = everything - quick
    assert all(s.startswith("model vit_base_patch14_dinov2") and s.endswith("batch 8") for s in left_out)
    assert {s.split()[2] for s in left_out} >= {"f32", "bf16"}
    assert "model vit_base_patch14_dinov2 f32 batch 1" in quick
    assert "attention (1370, 80) bf16 batch 8" in quick


@pytest.mark.parametrize("served", [True, False])
def test_int8_is_measured_where_the_extension_has_it(monkeypatch, served):
    monkeypatch.setattr(cpu.peak, "flops", lambda dtype: 1e12 if served or dtype != torch.int8 else None)
    dtypes = {step.dtype for step in cpu.steps(["model", "pool"], quick=True) if step.operator == "model"}
    assert (torch.int8 in dtypes) is served
    assert all(step.dtype != torch.int8 for step in cpu.steps(["pool"], quick=True))
    names = {step.name for step in cpu.steps(["patch_embed"], quick=True) if step.dtype == torch.int8}
    assert names == (set(bench_patch_embed.NAMES) - {"image"} if served else set())


def test_int8_stands_beside_fastvits_own_bfloat16(monkeypatch):
    pytest.importorskip("timm")
    asked, optimize = [], bench_model.optimize
    monkeypatch.setattr(bench_model, "optimize", lambda model, quantize=None: asked.append(quantize) or optimize(model))
    c = bench_model.case("vit_tiny_patch16_224", torch.int8, 1)
    assert asked == ["int8", None]
    assert c.tensors[0].dtype == torch.bfloat16
    assert c.dtype == "int8"
    row = case.measure(dataclasses.replace(c, flops=1), seconds=1e-3)
    assert row.dtype == "int8"
    assert row.passed
    assert list(row.peer_speedups) == ["fastvit bf16"]
    assert not dataclasses.replace(row, fastvit_error=0.5).passed


def test_long_cases_take_fewer_rounds_and_tell_how_long():
    c = bench_pool.case("token", torch.float32, 1, width=TINY)
    long = dataclasses.replace(c, flops=10**12)
    assert (c.min_rounds, long.min_rounds) == (5, 3)
    assert c.estimate(2.0, rate=1e12) == 2.0
    assert 20 < long.estimate(2.0, rate=1e12) < 40
    assert long.estimate(2.0, rate=None) == 2.0


def test_goals_are_judged_row_by_row():
    openvino = dataclasses.replace(ROW, peer_speedups={"openvino": 1.04})
    rows = [openvino, dataclasses.replace(ROW, name="vit_small_patch16_224, batch 1", peer_speedups={"openvino": 1.05})]
    verdicts = {(v.goal.text, v.case): v.text for v in summary.judge(rows)}
    assert verdicts["float32 over OpenVINO", "vit_base_patch16_224, batch 8, f32"] == "NOT REACHED"
    assert verdicts["float32 over OpenVINO", "vit_small_patch16_224, batch 1, f32"] == "reached"
    assert verdicts["float32, share of the peak", "vit_base_patch16_224, batch 8, f32"] == "reached"
    assert verdicts["bfloat16 over OpenVINO", "-"] == "not measured"
    # The share of a bus says nothing about arithmetic.
    memory = summary.judge([dataclasses.replace(ROW, limit="memory")])
    assert all(v.value is None for v in memory)
    assert "2 of 3 reached, 6 not measured" in summary.summary(rows)


def test_a_record_is_read_back(tmp_path, monkeypatch, capsys):
    old = {k: v for k, v in dataclasses.asdict(ROW).items() if k not in ("extra_bytes", "peer_speedups")}
    (tmp_path / "cpu.json").write_text(json.dumps({"rows": [old, {**dataclasses.asdict(ROW), "of the future": 1}]}))
    assert summary.read(tmp_path / "cpu.json") == [ROW, ROW]
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path / "cpu.json")])
    assert summary.main() == 0
    assert "90%  reached" in capsys.readouterr().out


def test_pictures_take_any_precision(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [dataclasses.replace(ROW, dtype=dtype) for dtype in ("f32", "bf16", "int8")]
    for name, draw in (("bars", plots.bars), ("roofline", plots.roofline)):
        sizes = []
        for some in (rows[:1], rows):
            draw(some, tmp_path / f"{name}.png", "a machine")
            sizes.append((tmp_path / f"{name}.png").stat().st_size)
        assert sizes[0] < sizes[1]
    plots.roofline([dataclasses.replace(ROW, peak=None)], tmp_path / "none.png", "a machine")


def test_every_operator_has_a_marker_and_a_color_of_its_own():
    assert set(plots._OPERATORS) == set(cpu.BENCHMARKS)
    for looks in zip(*plots._OPERATORS.values(), strict=True):
        assert len(set(looks)) == len(plots._OPERATORS)


def test_the_runner_writes_its_records(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cpu, "BATCHES", (1,))
    monkeypatch.setattr(bench_attention, "NAMES", ((197, 64),))
    command = ["cpu", "--only", "pool", "attention", "--seconds", "0.001", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert cpu.main() == 0
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert [r["dtype"] for r in record["rows"]] == ["f32", "bf16", "f32", "f32", "bf16", "bf16"]
    assert record["environment"]["versions"]["torch"]
    assert all((r["scores_bytes"] == 4 * 197 * 197) is (r["operator"] == "attention") for r in record["rows"])
    assert (tmp_path / "cpu.png").stat().st_size > 5000
    assert (tmp_path / "cpu-roofline.png").stat().st_size > 5000
    output = capsys.readouterr().out
    assert output.count(" % of ") == 6
    assert output.count("attention over SDPA's fastest layout") == 2

    # One benchmark again, of the same machine: the other's rows stay.
    monkeypatch.setattr(sys, "argv", ["cpu", "--only", "attention", "--seconds", "0.002", "--output", str(tmp_path)])
    assert cpu.main() == 0
    again = json.loads((tmp_path / "cpu.json").read_text())
    assert [(r["operator"], r["dtype"]) for r in again["rows"]] == [(r["operator"], r["dtype"]) for r in record["rows"]]
    same = [a == b for a, b in zip(again["rows"], record["rows"], strict=True)]
    assert same == [r["operator"] == "pool" for r in record["rows"]]

    again["environment"]["versions"]["torch"] = "another"
    (tmp_path / "cpu.json").write_text(json.dumps(again))
    assert cpu.main() == 0
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert {r["operator"] for r in rows} == {"attention"}


def test_peers_are_measured_or_left_out_with_a_line(monkeypatch, tmp_path, capsys):
    pytest.importorskip("timm")
    monkeypatch.setattr(cpu, "BATCHES", (1,))
    monkeypatch.setattr(bench_model, "NAMES", ("vit_tiny_patch16_224",))
    monkeypatch.setattr(bench_model, "DTYPES", case.FLOATS)
    monkeypatch.setattr(cpu, "missing", lambda peer: "openvino is not installed" if peer == "openvino" else None)
    monkeypatch.setitem(peers.PEERS, "compile", lambda model, image: peers.Configured(model, "as it is"))
    command = ["cpu", "--only", "model", "--seconds", "0.001", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--peers", "compile", "openvino"])
    assert cpu.main() == 0
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    for key in ("peer_milliseconds", "peer_speedups"):
        assert all(list(row[key]) == ["compile"] for row in rows)
    assert all(row["peer_settings"] == {"compile": "as it is"} for row in rows)
    output = capsys.readouterr().out
    assert "left out: openvino: openvino is not installed" in output
    assert output.count("  compile ") == 2


@pytest.mark.parametrize("peer", ["openvino", "onnxruntime"])
def test_a_peer_that_is_not_installed_says_so(monkeypatch, peer):
    def absent(name):
        raise peers.MissingLibraryError(f"{name} is not installed")

    monkeypatch.setattr(peers, "import_library", absent)
    assert "is not installed" in peers.missing(peer)
    assert peers.missing("compile") is None


@pytest.mark.parametrize("name", [pytest.param("compile", marks=pytest.mark.slow), "openvino", "onnxruntime"])
def test_a_peer_computes_the_same(name):
    if reason := peers.missing(name):
        pytest.skip(reason)
    c = bench_model.case("vit_tiny_patch16_224", torch.float32, 2, peers=[name])
    with torch.inference_mode():
        expected, actual = c.eager(*c.tensors), c.peers[name](*c.tensors)
    assert relative_l2(actual, expected) < 1e-4


def test_openvino_runs_in_the_precision_that_is_compared():
    if reason := peers.missing("openvino"):
        pytest.skip(reason)
    c = bench_model.case("vit_tiny_patch16_224", torch.bfloat16, 2, peers=["openvino"])
    call = c.peers["openvino"]
    native = "BF16" in peers.import_library("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert call.settings.endswith(", bf16" if native else ", f32")
    with torch.inference_mode():
        difference = relative_l2(call(*c.tensors), c.expected())
    # What bfloat16 makes of it, and float32 does not.
    assert 1e-4 < difference < 0.1 if native else difference < 1e-4


def test_a_model_that_is_not_served_is_not_measured():
    with pytest.raises(ValueError, match="'resnet10t' has no block"):
        bench_model.case("resnet10t", torch.float32, 1)


def test_a_wrong_kernel_fails_its_benchmark():
    c = bench_pool.case("token", torch.float32, 1, width=TINY)
    wrong = dataclasses.replace(c, fused=lambda *t: c.fused(*t) * 1.001)
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
    training = [step for key, step in record["steps"].items() if key.startswith("training")]
    assert len(training) == len(gpu.DRY_MODELS)
    assert all(error < 1e-4 for step in training for error in step["gradient_errors"].values())
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
    schedules = {
        "norm_linear": ("normalising", "folded", "persistent", "cublas"),
        "linear_residual": ("product", "persistent", "cublas"),
        "mlp": ("composed", "fused"),
    }
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    for operator, names in schedules.items():
        assert all(f" {name} " in lines[operator] for name in names)
    measured = json.loads(path.read_text())["sm90"]
    assert [list(buckets) for buckets in measured.values()] == [["6"], ["6"], ["6"]]


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
