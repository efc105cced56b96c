"""Everything that a GPU can tell, in one command: is every kernel right, then how fast is it beside its peers.

    python -m benchmarks.gpu [--minutes 9] [--only models ...] [--fresh]
    python -m benchmarks.gpu --dry-run      the same script without a GPU: tiny shapes in Triton's interpreter

Steps run in the order of what is worth knowing most, until the time is spent.  Each one's result is written at once to
gpu.json in benchmarks/results/<device>/, and a later run goes on where this one stopped.  A step that fails is recorded
and the next one runs; after a fault that leaves CUDA unusable the script starts itself again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit
from benchmarks import (
    bench_attention,
    bench_linear_residual,
    bench_mlp,
    bench_model,
    bench_norm_backward,
    bench_norm_linear,
    bench_patch_embed,
    bench_pool,
)
from benchmarks.case import VIT_B, Case, Row, Width, measure
from benchmarks.cpu import RESULTS
from benchmarks.plots import bars
from fastvit import ops
from fastvit._compat import import_timm
from fastvit.bench import peak
from fastvit.bench.models import build
from fastvit.bench.timing import interleaved

ROOT = Path(__file__).parent.parent
GROUPS = ("ceilings", "correctness", "models", "latency", "operators", "training")
TINY = Width("tiny", dim=32, num_heads=2, tokens=17, patch_size=8, image_size=32, num_classes=10)

# Measured first, then single images and operators, then everything else: all models in all batches, and their training.
FIRST_MODELS = (
    ("vit_base_patch16_224", 256),
    ("vit_base_patch16_224", 1),
    ("vit_large_patch16_224", 256),
    ("vit_small_patch16_224", 256),
    ("vit_base_patch14_dinov2", 32),
    ("vit_base_patch16_dinov3", 32),
    ("vit_base_patch16_224", 32),
    ("vit_so400m_patch14_siglip_224", 32),
    ("vit_tiny_patch16_224", 256),
    ("vit_large_patch16_224", 1),
    ("vit_huge_patch14_224", 32),
)
MODELS = tuple(dict.fromkeys(name for name, _ in FIRST_MODELS))
BATCHES = (256, 32, 1)
# One of each family, which `_tiny` makes small.
DRY_MODELS = tuple(
    (name, 1)
    for name in MODELS
    if name == "vit_base_patch16_224" or any(family in name for family in ("dinov2", "dinov3", "siglip"))
)
FIRST_TRAINING = (("vit_base_patch16_224", 128),)
# ViT-B's of one image shows what launching costs.
TRAINING = (*((name, 32) for name in MODELS), ("vit_base_patch16_224", 1), ("vit_base_patch16_224", 256))
# One image, and the milliseconds that are the goal.
LATENCY: tuple[tuple[str, float | None], ...] = (("vit_base_patch16_224", 0.5), ("vit_small_patch16_224", None))
OPERATORS = (
    (bench_attention, (197, 257, 577)),
    (bench_norm_linear, bench_norm_linear.NAMES),
    (bench_linear_residual, bench_linear_residual.NAMES),
    (bench_patch_embed, bench_patch_embed.NAMES),
    (bench_pool, bench_pool.NAMES),
    (bench_mlp, bench_mlp.NAMES),
    (bench_norm_backward, bench_norm_backward.NAMES),
)
# Compiling takes minutes where it tunes: not with less time than this left.
_COMPILE_SECONDS = 100.0
_CORRECTNESS = ("tests/kernels", "tests/csrc/cuda", "tests/adapters/test_graphs_cuda.py")


@dataclass
class Run:
    """What the steps share: where they run, how long they may, and what is already known."""

    device: str
    dtype: torch.dtype
    deadline: float
    path: Path
    dry: bool
    compiling: bool
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    @property
    def compiles(self) -> bool:
        return self.compiling and self.left > _COMPILE_SECONDS

    @property
    def seconds(self) -> float:
        """Measuring time of a step."""
        return 0.01 if self.dry else 1.0

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.record, indent=2) + "\n")


@dataclass(frozen=True)
class Step:
    group: str
    name: str
    run: Callable[[Run], dict[str, Any]]

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"


# ---- Steps -----------------------------------------------------------------------------------------


def steps(dry: bool) -> Iterator[Step]:
    yield Step("ceilings", "peak product and copy", _ceilings)
    yield Step("correctness", "kernel tests", _correctness)
    models, training = (DRY_MODELS, DRY_MODELS) if dry else (FIRST_MODELS, FIRST_TRAINING)
    yield from _model_steps(models)
    for name, goal in ((DRY_MODELS[0][0], None),) if dry else LATENCY:
        yield Step("latency", f"{name}, batch 1", partial(_latency, name=name, goal=goal))
    for module, names in OPERATORS:
        for name in (17,) if dry and module is bench_attention else names[:1] if dry else names:
            for batch in (1,) if dry else BATCHES:
                label = f"{module.__name__.removeprefix('benchmarks.bench_')} {name}, batch {batch}"
                yield Step("operators", label, partial(_operator, module=module, name=name, batch=batch))
    yield from _training_steps(training)
    if not dry:
        everything = [(name, batch) for batch in BATCHES for name in MODELS]
        yield from _model_steps([m for m in everything if m not in FIRST_MODELS])
        yield from _training_steps(TRAINING)


def _model_steps(models: Iterable[tuple[str, int]]) -> Iterator[Step]:
    for name, batch in models:
        yield Step("models", f"{name}, batch {batch}", partial(_model, name=name, batch=batch))


def _training_steps(models: Iterable[tuple[str, int]]) -> Iterator[Step]:
    for name, batch in models:
        yield Step("training", f"{name}, batch {batch}", partial(_training, name=name, batch=batch))


def _ceilings(run: Run) -> dict[str, Any]:
    rate, copy_rate = peak.flops(run.dtype, run.device), peak.bandwidth(run.device)
    return {"tflops": rate and rate / 1e12, "gigabytes_per_second": copy_rate and copy_rate / 1e9}


def _correctness(run: Run) -> dict[str, Any]:
    """The kernels' own tests, which run on the GPU where there is one."""
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: pip install pytest hypothesis")
    chosen = ("tests/kernels/test_pool.py", "-k", "with_and_without_a_head") if run.dry else _CORRECTNESS
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *chosen]
    if importlib.util.find_spec("xdist") is not None and not run.dry:
        command += ["-n", "8"]  # most of the time goes into compiling kernels
    with tempfile.TemporaryFile("w+") as output:
        # What has passed by then is told even if the time ends first.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=run.left / 2, check=False
            )
        output.seek(0)
        text = output.read()
    outcomes: dict[str, str] = {}
    for line in text.splitlines():
        if (test := re.search(r"tests/\S+::.*?(?= PASSED| FAILED| ERROR| SKIPPED| - |$)", line)) and (
            outcome := re.search(r"PASSED|FAILED|ERROR|SKIPPED", line)
        ):
            outcomes[test[0].strip()] = outcome[0]
    if not outcomes:
        raise RuntimeError(f"no test has run: {text[-400:]}")
    told = list(outcomes.values())
    return {
        "passed": told.count("PASSED"),
        "skipped": told.count("SKIPPED"),
        "failed": told.count("FAILED") + told.count("ERROR"),
        "ended": bool(re.search(r"^=+ .* in [\d.]+s", text, re.M)),
        "failures": re.findall(r"^(?:FAILED|ERROR) (tests/.*)", text, re.M)[:100],
    }


def _operator(run: Run, module: Any, name: Any, batch: int) -> dict[str, Any]:
    case = module.case(name, run.dtype, batch, run.device, TINY if run.dry else VIT_B)
    peers: dict[str, Callable[..., Tensor]] = {}
    if module is bench_attention and not run.dry:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            peers[backend.name.removesuffix("_ATTENTION").lower()] = partial(_with_sdpa, backend, case.eager)
    elif run.compiles:
        peers["compile"] = torch.compile(case.eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    return _measured(replace(case, peers=peers), run)


def _with_sdpa(backend: SDPBackend, call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return call(*tensors)


def _model(run: Run, name: str, batch: int) -> dict[str, Any]:
    case = bench_model.case(name, run.dtype, batch, run.device, _tiny if run.dry else build)
    compiled = {"compile": torch.compile(case.eager, mode="max-autotune", dynamic=False)} if run.compiles else {}
    return _measured(replace(case, peers=compiled), run)


def _latency(run: Run, name: str, goal: float | None) -> dict[str, Any]:
    """One image from its launch until the output is there: CUDA graphs, fastvit without them, and torch.compile's."""
    case = bench_model.case(name, run.dtype, 1, run.device, _tiny if run.dry else build)
    graphed = fastvit.optimize(copy.deepcopy(case.eager), cuda_graphs=True)  # type: ignore[type-var]
    peers: dict[str, Callable[..., Tensor]] = {"without graphs": case.fused}
    if run.compiles:
        peers["reduce-overhead"] = torch.compile(case.eager, mode="reduce-overhead", dynamic=False)
    calls = {who: partial(_awaited, call) for who, call in peers.items()}
    eager = partial(_awaited, case.eager)
    timed = replace(case, eager=eager, fused=partial(_awaited, graphed), peers=calls)
    return {**_measured(timed, run), "cuda_graphs": fastvit.report(graphed).cuda_graphs[""], "goal_milliseconds": goal}


def _awaited(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    out = call(*tensors)
    if out.is_cuda:
        torch.cuda.synchronize()
    return out


def _tiny(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The same kind of model, but small."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
    return import_timm().create_model(name, **options).eval(), (3, 32, 32)


def _measured(case: Case, run: Run) -> dict[str, Any]:
    """Drop the peers that fail, then measure: seconds until a peer first answered tell what compiling cost."""
    peers, first, failed = {}, {}, {}
    with torch.inference_mode():
        for name, call in case.peers.items():
            start = time.perf_counter()
            try:
                call(*case.tensors)
            except Exception as error:
                failed[name] = _short(error)
            else:
                peers[name], first[name] = call, time.perf_counter() - start
    row = measure(replace(case, peers=peers), run.seconds)
    return {**asdict(row), "passed": row.passed, "first_seconds": first, "failed_peers": failed}


def _training(run: Run, name: str, batch: int) -> dict[str, Any]:
    """Forward and backward: milliseconds, peak memory beyond the model's, and gradients against float64."""
    torch.manual_seed(0)
    model, size = (_tiny if run.dry else build)(name)
    eager = model.to(run.device, run.dtype).train()
    images = torch.randn(batch, *size, device=run.device, dtype=run.dtype)
    models: dict[str, Any] = {"eager": eager, "fastvit": fastvit.optimize(copy.deepcopy(eager))}
    if run.compiles:
        models["compile"] = torch.compile(copy.deepcopy(eager), dynamic=False)

    def gradients(model: nn.Module, x: Tensor) -> Tensor:
        model.zero_grad()
        model(x).float().square().mean().backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])

    few = images[:4]
    truth = gradients(copy.deepcopy(eager).double(), few.double())
    errors = {who: ((gradients(m, few) - truth).norm() / truth.norm()).item() for who, m in models.items()}
    memory = {}
    if run.device == "cuda":
        for who, m in models.items():
            gradients(m, images)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradients(m, images)
            memory[who] = (torch.cuda.max_memory_allocated() - before) / 2**20
    calls = {who: partial(gradients, m, images) for who, m in models.items()}
    times, _ = interleaved(calls, dtype=run.dtype, device=run.device, seconds=5 * run.seconds)
    milliseconds = {who: 1e3 * median(values) for who, values in times.items()}
    return {"milliseconds": milliseconds, "memory_mebibytes": memory, "gradient_errors": errors}


# ---- The run ---------------------------------------------------------------------------------------


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:500]


def execute(run: Run, step: Step) -> bool:
    """Run one step and record it; False where CUDA is unusable afterwards."""
    start = time.time()
    alive = True
    try:
        with ops.use_backend("triton") if run.dry else contextlib.nullcontext():
            result = {"status": "ok", **step.run(run)}
    except Exception as error:
        result = {"status": "failed", "error": _short(error)}
        try:
            if run.device == "cuda":
                torch.cuda.synchronize()
        except Exception:
            alive = False
    run.record["steps"][step.key] = {**result, "seconds": round(time.time() - start, 1)}
    run.save()
    torch._dynamo.reset()
    gc.collect()
    if alive and run.device == "cuda":
        torch.cuda.empty_cache()
    return alive


def summary(key: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    if result["status"] != "ok":
        return f"{key:<44} FAILED  {result['error'].splitlines()[0][:70]}"
    if "fastvit_milliseconds" in result:
        row = Row(**{f.name: result[f.name] for f in fields(Row)})
        share = "" if row.fraction_of_limit is None else f"{row.fraction_of_limit:4.0%} of {row.limit:<11}"
        peers = "".join(f"  {who} {ms / row.fastvit_milliseconds:.2f}x" for who, ms in row.peer_milliseconds.items())
        wrong = "" if row.passed else f"  WRONG: error {row.fastvit_error:.1e}, eager's {row.eager_error:.1e}"
        goal = result.get("goal_milliseconds")
        judged = (
            "" if goal is None else f"  goal {goal} ms {'reached' if row.fastvit_milliseconds <= goal else 'MISSED'}"
        )
        return f"{key:<44}{row.fastvit_milliseconds:>9.3f} ms  {share}  eager {row.speedup:.2f}x{peers}{judged}{wrong}"
    if "milliseconds" in result:
        times, own = result["milliseconds"], result["milliseconds"]["fastvit"]
        return f"{key:<44}{own:>9.3f} ms  " + "  ".join(
            f"{who} {ms / own:.2f}x" for who, ms in times.items() if who != "fastvit"
        )
    told = {k: v for k, v in result.items() if k not in ("status", "seconds", "failures")}
    return f"{key:<44} " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())


def environment(device: str) -> dict[str, Any]:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    name = torch.cuda.get_device_name() if device == "cuda" else "dry run"
    return {"device": name, "commit": commit, "versions": fastvit.env()["versions"]}


def restart(*more: str) -> None:
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], *more])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: 9)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="some of the groups")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has measured")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    parser.add_argument("--output", type=Path, help="a folder (default: benchmarks/results/<device>)")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # of the run that started itself again
    arguments = parser.parse_args()
    if arguments.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported, and torch imports Triton
            os.environ["TRITON_INTERPRET"] = "1"
            restart()
        from tests.kernels import interpreter

        interpreter.use()
    elif not torch.cuda.is_available():
        parser.error("no CUDA GPU is at hand; --dry-run proves the script without one")

    device = "cpu" if arguments.dry_run else "cuda"
    found = environment(device)
    slug = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    folder = arguments.output or (Path(tempfile.mkdtemp()) if arguments.dry_run else RESULTS / slug)
    run = Run(
        device,
        torch.float32 if arguments.dry_run else torch.bfloat16,
        arguments.deadline or time.time() + 60 * arguments.minutes,
        folder / "gpu.json",
        arguments.dry_run,
        not arguments.no_compile,
    )
    fresh = arguments.fresh and arguments.deadline is None
    if run.path.exists() and not fresh:
        run.record = json.loads(run.path.read_text())
    if run.record.get("environment") != found:
        run.record = {"environment": found, "steps": {}}

    chosen = [step for step in steps(arguments.dry_run) if step.group in arguments.only]
    for step in chosen:
        if step.key in run.record["steps"] or run.left < 0:
            continue
        alive = execute(run, step)
        print(summary(step.key, run.record["steps"][step.key]), flush=True)
        if not alive:
            print("CUDA is unusable after this; starting again", flush=True)
            os.execv(
                sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], f"--deadline={run.deadline}"]
            )

    results = {step.key: run.record["steps"][step.key] for step in chosen if step.key in run.record["steps"]}
    rows = [Row(**{f.name: r[f.name] for f in fields(Row)}) for r in results.values() if "fastvit_milliseconds" in r]
    if rows:
        bars(rows, folder / "gpu.png", found["device"])
    print(f"\n{found['device']}, torch {found['versions']['torch']}, triton {found['versions']['triton']}")
    print("\n".join(summary(key, result) for key, result in results.items()))
    if left := len(chosen) - len(results):
        print(f"{left} steps are left: run the same command again")
    print(f"written: {run.path}")
    bad = [r for r in results.values() if r["status"] != "ok" or r.get("failed") or r.get("passed") is False]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
