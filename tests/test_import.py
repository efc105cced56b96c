"""What `import fastvit` costs and touches, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time

# What a user who only imports fastvit must not pay for.
LAZY = ("triton", "timm", "transformers", "torchvision", "open_clip", "rich", "matplotlib", "sklearn", "fastvit._C")
# Everything public: modules, functions and classes that are loaded on first use.
TOUCH = "import torch, fastvit; [getattr(fastvit, name) for name in fastvit.__all__]"


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def seconds(code: str) -> float:
    begin = time.perf_counter()
    run(code)
    return time.perf_counter() - begin


def test_import_is_silent() -> None:
    """No output and no warning: warnings are errors here, once torch has had its say."""
    done = run("import torch, warnings; warnings.simplefilter('error'); import fastvit; fastvit.optimize")
    assert (done.stdout, done.stderr) == ("", "")


def test_import_loads_no_optional_library() -> None:
    done = run(f"import sys, fastvit; print([name for name in {LAZY!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_the_public_names_load_no_optional_library() -> None:
    done = run(f"import sys, torch; before = set(sys.modules); {TOUCH}; print(sorted(set(sys.modules) - before))")
    loaded = {name.split("'")[1].split(".")[0] for name in done.stdout.split(", ")}
    assert "fastvit" in loaded
    assert not loaded & {name for name in LAZY if name != "fastvit._C"}


def test_import_takes_under_half_a_second_beyond_torch() -> None:
    """The least of several differences: noise only adds."""
    code = "import torch, fastvit, fastvit.ops, fastvit.nn"
    assert min(seconds(code) - seconds("import torch") for _ in range(5)) < 0.5


def test_works_without_cuda() -> None:
    code = (
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "import torch, fastvit\n"
        "from fastvit import ops\n"
        "x, w = torch.randn(5, 8), torch.randn(3, 8)\n"
        "torch.testing.assert_close(ops.norm_linear(x, w, norm='none'), x @ w.T)"
    )
    run(code)


def test_every_public_name_is_there() -> None:
    run(f"{TOUCH}; assert set(fastvit.__all__) <= set(dir(fastvit))")
