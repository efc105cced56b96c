"""The command, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastvit.cli import main

pytest.importorskip("rich")
pytest.importorskip("timm")
SMALL = ["--model", "vit_tiny_patch16_224", "--batch", "1", "--seconds", "0.1"]


def run(capsys, *arguments):
    code = main(list(arguments))
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("command", [[], ["env"], ["bench"], ["check"], ["attention"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: fastvit" in capsys.readouterr().out


def test_env(capsys):
    code, out, _ = run(capsys, "env", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["backends"]) == {"cpp", "triton", "cuda_cpp", "reference"}
    for backend in found["backends"].values():
        assert backend["live"] or (backend["why"] and backend["how"])
    assert found["backends"]["cpp"]["live"]
    assert found["cpu"]["isa"] in found["cpu"]["supported_isas"]
    assert found["openmp"]["shared_with_torch"] is True
    code, out, _ = run(capsys, "env")
    assert code == 0
    assert "C++ on CPU" in out


def test_bench(capsys, tmp_path):
    plot = tmp_path / "plot.png"
    code, out, _ = run(capsys, "bench", *SMALL, "--output", str(plot), "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [r["dtype"] for r in rows] == ["f32", "bf16"]
    for row in rows:
        assert row["rounds"] >= 2
        assert row["speedup"] > 0
        assert 0 < row["fraction_of_peak"] < 1.5
        limit = 1e-4 if row["dtype"] == "f32" else 0.2
        assert 0 < row["fastvit_error"] < limit
    from PIL import Image

    with Image.open(plot) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10


def test_bench_prints_a_table_and_takes_an_image(capsys, tmp_path):
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").save(picture)
    code, out, _ = run(
        capsys, "bench", *SMALL, "--dtype", "bf16", "--image", str(picture), "--output", str(tmp_path / "plot.png")
    )
    assert code == 0
    assert "speed-up" in out
    assert "plot.png" in out


@pytest.mark.parametrize(
    "model",
    [
        "vit_tiny_patch16_224",
        pytest.param("torchvision:vit_b_32", marks=pytest.mark.slow),
        pytest.param("ViTModel", marks=pytest.mark.slow),
    ],
)
def test_check(capsys, model):
    size = ["--image-size", "64"]
    code, out, _ = run(capsys, "check", model, *size, "--json")
    assert code == 0, out
    result = json.loads(out)
    assert result["verdict"] == "PASS"
    assert {r["dtype"] for r in result["rows"]} == {"f32", "bf16"}


def test_check_prints_the_report(capsys):
    code, out, _ = run(capsys, "check", "vit_tiny_patch16_224", "--dtype", "f32")
    assert code == 0
    assert "13 replaced, 0 left" in out
    assert "PASS" in out


def test_check_reads_a_config_file(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config.save_pretrained(tmp_path)
    code, out, _ = run(capsys, "check", str(tmp_path), "--dtype", "f32", "--json")
    assert code == 0
    assert json.loads(out)["verdict"] == "PASS"


def test_check_fails_where_nothing_was_replaced(capsys):
    code, out, _ = run(capsys, "check", "resnet18", "--dtype", "f32", "--batch", "1")
    assert code == 1
    assert "nothing was replaced" in out


def test_attention(capsys):
    arguments = ["--tokens", "50", "--head-dim", "72", "--heads", "2", "--seconds", "0.1"]
    code, out, _ = run(capsys, "attention", *arguments, "--json")
    assert code == 0
    for row in json.loads(out)["rows"]:
        assert row["fastvit_error"] <= 1.2 * row["sdpa_error"] or row["fastvit_error"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--model", "vit_tny_patch16_224"], "close: vit_tiny_patch16_224"),
        (["bench", *SMALL, "--image", "/nonexistent.png"], "can't be read"),
        (["bench", *SMALL, "--image", __file__], "can't be read"),
        (["bench", *SMALL, "--output", "/nonexistent/plot.png"], "does not exist"),
        (["bench", *SMALL, "--output", "plot.mp3"], "accepted endings: .png"),
        (["bench", "--model", "resnet18", *SMALL[2:]], "no Vision Transformer block"),
        (["check", "ViTModle"], "close: ViTModel"),
        (["check", "BertModel"], "not images"),
        (["check", "torchvision:vit_b_15"], "close: vit_b_16"),
        (["check", "facebook/dinov2-base"], "nothing is downloaded"),
        (["check", "missing/config.json"], "no transformers config"),
        (["check", "torchvision:vit_b_16", "--image-size", "50"], "can't be built"),
        (["attention", "--device", "cuda"], "no GPU"),
        (["bench", "--cuda-graphs", "--device", "cpu"], "cuda-graphs: needs a GPU"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert not out
    assert err.startswith("fastvit: ")
    assert message in err
    assert err.strip().count("\n") == 0


@pytest.mark.parametrize(
    "arguments", [["bench", "--batch", "0"], ["bench", "--seconds", "x"], ["bench", "--dtype", "f8"], []]
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("fastvit")
    assert err.count("\n") == 1
    assert "--help" in err


def test_a_missing_library_is_named(capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "timm" else real(name, *a))
    code, _, err = run(capsys, "bench", *SMALL)
    assert code == 2
    assert "timm is not installed" in err
    assert "pip install" in err


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastvit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastvit ")


def test_ctrl_c_is_quiet(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvit.cli._env", interrupted)
    assert run(capsys, "env") == (130, "", "fastvit: stopped\n")


def test_a_reader_may_leave():
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvit", "env", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_help_does_not_import_torch():
    code = "import sys, fastvit.cli as c\ntry: c.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
