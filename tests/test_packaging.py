"""Clean clone -> sdist, wheel, editable -> another environment, with and without a compiler. Slow: it compiles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git clone"),
]

USE = """
import json, torch, fastvit, fastvit.kernels
from fastvit import ops
x, w = torch.randn(5, 8), torch.randn(3, 8)
torch.testing.assert_close(ops.norm_linear(x, w, norm="none"), x @ w.T)
from fastvit.ops._backend import extension
print(json.dumps({"file": fastvit.__file__, "version": fastvit.__version__, "extension": extension() is not None,
                  "cuda": bool(extension() and extension().cuda_compiled()), "kernels": fastvit.kernels.__file__}))
"""


def run(*command: object, cwd: Path, env: dict[str, str] | None = None, ok: bool = True) -> str:
    """Output and errors of a command that must succeed, or with ok=False fail."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "FASTVIT_CUDA": "off", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def build(clone: Path, out: Path, *what: str, env: dict[str, str] | None = None, ok: bool = True) -> str:
    """`pip wheel` in an isolated build environment, which holds no torch."""
    return run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", out, *what, cwd=clone, env=env, ok=ok)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commit under test, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("a clone")
    run("git", "clone", "--quiet", ROOT, folder, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build(clone, out, ".")
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An empty environment that sees this one's torch."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # A .pth line that is a folder: its packages are found, its own .pth files (an editable fastvit) are not read.
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, *what: object) -> None:
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *what, cwd=python.parent)


def use(python: Path) -> dict:
    """What the installed package says of itself, from a folder that is not the clone."""
    return json.loads(run(python, "-c", USE, cwd=python.parent).splitlines()[-1])


def test_wheel_works_in_an_empty_environment(wheel: Path, python: Path) -> None:
    install(python, wheel)
    found = use(python)
    assert found["extension"]
    assert Path(found["file"]).is_relative_to(python.parents[1])
    assert found["kernels"].endswith("fastvit/kernels/__init__.py")
    assert found["version"] in wheel.name
    assert (python.parent / "fastvit").is_file()


def test_wheel_holds_the_package_and_nothing_else(clone: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastvit"}
    assert {"fastvit/py.typed", "fastvit/_build.json", "fastvit/kernels/norm_linear.py"} <= set(names)
    tracked = run("git", "ls-files", "fastvit", "kernels", cwd=clone).split()
    expected = {name if name.startswith("fastvit") else f"fastvit/{name}" for name in tracked if name.endswith(".py")}
    assert expected == {name for name in names if name.endswith(".py")}


def test_a_second_build_compiles_nothing_and_a_header_what_includes_it(
    clone: Path, wheel: Path, tmp_path: Path
) -> None:
    """In isolated builds, whose environment has another path each time."""
    assert "c++ " not in built(build(clone, tmp_path / "again", "."))
    (clone / "csrc/cpu/dispatch.h").touch()
    rebuilt = built(build(clone, tmp_path / "header", "."))
    assert "dispatch.cpp" in rebuilt and "bindings.cpp" in rebuilt and "pool.cpp" not in rebuilt


def built(log: str) -> str:
    """What ninja ran."""
    return "\n".join(line for line in log.splitlines() if line.strip().startswith("["))


def test_sdist_builds(clone: Path, wheel: Path, tmp_path: Path) -> None:
    """The sdist, built where there is no git, holds all that the clone's wheel held."""
    code = "import setuptools.build_meta as backend; backend.build_sdist('sdist')"
    run(sys.executable, "-c", code, cwd=clone)
    (sdist,) = (clone / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in run("git", "ls-files", cwd=clone).splitlines() if not name.endswith(".png")}
    assert tracked - names <= {".gitignore"}
    assert not {name for name in names if name.endswith((".so", ".pyc", "_build.json"))}
    build(clone, tmp_path / "out", str(sdist))
    (rebuilt,) = (tmp_path / "out").glob("*.whl")
    assert zipfile.ZipFile(rebuilt).namelist() == zipfile.ZipFile(wheel).namelist()


def test_editable_install(clone: Path, python: Path) -> None:
    install(python, "-e", clone)
    found = use(python)
    assert found["extension"]
    assert found["file"] == str(clone / "fastvit" / "__init__.py")
    assert found["kernels"] == str(clone / "kernels" / "__init__.py")


def without_compilers(folder: Path) -> dict[str, str]:
    """An environment whose PATH has git and the shell, but no compiler."""
    folder.mkdir()
    for name in ("git", "sh", "env", "uname"):
        if path := shutil.which(name):
            (folder / name).symlink_to(path)
    return {"PATH": str(folder), "CXX": ""}


def test_without_a_compiler_the_install_succeeds_and_says_so(clone: Path, python: Path, tmp_path: Path) -> None:
    pure = tmp_path / "pure"
    run("git", "clone", "--quiet", clone, pure, cwd=tmp_path)
    log = build(pure, tmp_path / "out", ".", env=without_compilers(tmp_path / "bin"))
    assert "no C++ extension was built: missing a C++17 compiler" in log
    (wheel,) = (tmp_path / "out").glob("*.whl")
    record = json.loads(zipfile.ZipFile(wheel).read("fastvit/_build.json"))
    assert record["extension"] is False and "apt install g++" in record["missing"]
    install(python, wheel)
    assert not use(python)["extension"]


def test_a_compiler_that_fails_is_named(clone: Path, tmp_path: Path) -> None:
    pure = tmp_path / "pure"
    run("git", "clone", "--quiet", clone, pure, cwd=tmp_path)
    assert "false can't compile an empty program" in build(pure, tmp_path, ".", env={"CXX": "false"})
    assert "CXX=no-such-compiler was not found" in build(pure, tmp_path, ".", env={"CXX": "no-such-compiler"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FASTVIT_CUDA": "maybe"}, "FASTVIT_CUDA: 'maybe' is not known; accepted: auto, on, off"),
        ({"FASTVIT_CUDA_ARCHS": "80;hopper"}, "FASTVIT_CUDA_ARCHS: 'hopper' is not a compute capability"),
        ({"FASTVIT_CUDA_ARCHS": ";"}, "FASTVIT_CUDA_ARCHS: ';' names no compute capability"),
    ],
)
def test_bad_settings_stop_the_install(clone: Path, tmp_path: Path, settings: dict[str, str], message: str) -> None:
    assert message in build(clone, tmp_path, ".", env=settings, ok=False)


def test_a_broken_nvcc_is_an_error_if_cuda_is_on_and_a_line_otherwise(clone: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    path = {"PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"}
    why = f"{nvcc} can't compile an empty kernel"
    assert f"FASTVIT_CUDA=on, but {why}" in build(clone, tmp_path, ".", env={**path, "FASTVIT_CUDA": "on"}, ok=False)
    assert f"csrc/cuda is left out: {why}" in build(clone, tmp_path, ".", env={**path, "FASTVIT_CUDA": "auto"})
