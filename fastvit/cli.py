"""The command `fastvit`: env, bench, check, attention."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import fastvit
from fastvit._compat import MissingLibraryError, import_library
from fastvit.bench import DTYPES, LIBRARIES, Progress, UsageError

# torch and everything above it is imported where it is needed: --help and a mistyped option answer at once.

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 a check failed, 2 the request can't be served."""
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except (UsageError, MissingLibraryError) as error:
        print(f"fastvit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastvit: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout left, as `| head` does; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, list):  # as it would be typed
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        # A default of None or False says nothing.
        return super()._get_help_string(action) if action.default else action.help


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastvit",
        description="Fused kernels for Vision Transformers: what runs here, how fast, and how exactly.",
    )
    parser.add_argument("--version", action="version", version=f"fastvit {fastvit.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *examples: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
            formatter_class=_Formatter,
        )
        sub.add_argument("--json", action="store_true", help="print JSON alone on stdout")
        sub.set_defaults(run=run)
        return sub

    command(
        "env",
        _env,
        "show versions, instruction sets and which backends are live",
        "fastvit env",
        "fastvit env --json",
    )

    bench = command(
        "bench",
        _bench,
        "measure eager PyTorch against fastvit on a photograph",
        "fastvit bench",
        "fastvit bench --model vit_base_patch16_224 --batch 1 8 --dtype bf16",
        "fastvit bench --image cat.jpg --output cat.png",
    )
    bench.add_argument("--model", default="vit_small_patch16_224", help="a model, as in `fastvit check`")
    bench.add_argument(
        "--batch", type=_positive, nargs="+", metavar="N", help="batch sizes (default: 8, or 64 on a GPU)"
    )
    _add_dtypes(bench)
    bench.add_argument("--image", type=Path, help="an image file (default: the photograph that scikit-learn ships)")
    bench.add_argument("--seconds", type=_seconds, default=16.0, help="measuring time over all rows")
    bench.add_argument("--output", type=Path, default=Path("fastvit-bench.png"), help="where the plot goes")
    bench.add_argument("--cuda-graphs", action="store_true", help="with fastvit.optimize(cuda_graphs=True), on a GPU")
    _add_machine(bench)

    check = command(
        "check",
        _check,
        "compare a model's fused outputs with float64 and eager PyTorch",
        "fastvit check vit_small_patch14_dinov2 --image-size 224",
        "fastvit check transformers:CLIPVisionModel --dtype bf16",
        "fastvit check path/to/config.json",
        "fastvit check torchvision:vit_b_16",
        "fastvit check ViT-B-32",
    )
    check.add_argument(
        "model",
        help="a timm name, a transformers class such as ViTModel or Dinov2Config, a config.json or its folder, a "
        "torchvision name, or an open_clip name; weights are random and nothing is downloaded",
    )
    check.add_argument("--library", choices=("auto", *LIBRARIES), default="auto", help="where it is from")
    _add_dtypes(check)
    check.add_argument("--image-size", type=_positive, metavar="PIXELS", help="default: the model's own")
    check.add_argument("--batch", type=_positive, metavar="N", default=2, help="images")
    _add_machine(check)

    attention = command(
        "attention",
        _attention,
        "measure fused attention against torch's scaled_dot_product_attention",
        "fastvit attention",
        "fastvit attention --tokens 197 577 --head-dim 64 72 80",
    )
    attention.add_argument(
        "--tokens", type=_positive, nargs="+", metavar="N", default=[197, 577, 1370], help="sequence lengths"
    )
    attention.add_argument("--heads", type=_positive, metavar="N", default=12, help="number of heads")
    attention.add_argument("--head-dim", type=_positive, nargs="+", metavar="N", default=[64], help="head dimensions")
    attention.add_argument("--batch", type=_positive, metavar="N", default=1, help="sequences")
    attention.add_argument("--seconds", type=_seconds, default=12.0, help="measuring time over all rows")
    _add_dtypes(attention)
    _add_machine(attention)
    return parser


def _add_dtypes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["f32", "bf16"], help="precisions")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: the GPU if there is one)")


def _set_machine(arguments: argparse.Namespace) -> str:
    """Apply --threads; returns the device."""
    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for, but torch sees no GPU (fastvit env says why)")
    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _machine_name(device: str) -> str:
    found = fastvit.env()
    if device == "cuda":
        return found["gpus"][0]["name"]
    threads = found["cpu"]["torch_threads"]
    return f"{found['cpu']['name']}, {threads} thread{'s' if threads > 1 else ''}"


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


# ---- Commands -------------------------------------------------------------------------------------


def _env(arguments: argparse.Namespace) -> int:
    found = fastvit.env()
    if arguments.json:
        _print_json(found)
        return 0
    cpu, openmp = found["cpu"], found["openmp"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    print(versions)
    print(f"platform    {found['platform']}")
    print(f"cpu         {cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} torch threads")
    print(f"isa         {cpu['isa'] or 'none'}: {cpu['isa_why']} ({', '.join(cpu['supported_isas']) or 'none'})")
    shared = {True: "torch's own", False: "not torch's: two thread pools", None: "none"}[openmp["shared_with_torch"]]
    print(f"openmp      {shared}" + (f" ({openmp['path']})" if openmp["path"] else ""))
    for gpu in found["gpus"]:
        print(f"gpu         {gpu['name']}, compute capability {gpu['compute_capability']}")
    titles = {"cpp": "C++ on CPU", "triton": "Triton on GPU", "cuda_cpp": "CUDA C++ on GPU", "reference": "plain torch"}
    for name, backend in found["backends"].items():
        print(f"{titles[name]:<17} {'live' if backend['live'] else 'not live: ' + backend['why']}")
        if not backend["live"]:
            print(f"{'':<17} to get it: {backend['how']}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from fastvit.bench.run import bench

    device = _set_machine(arguments)
    # Whatever can fail fails before the minute of measuring.
    if arguments.cuda_graphs and device != "cuda":
        raise UsageError("cuda-graphs: needs a GPU (fastvit env says what is missing)")
    for library in ("rich", "matplotlib", "PIL"):
        import_library(library)
    _check_output(arguments.output)
    with _progress(arguments.json) as progress:
        rows = bench(
            arguments.model,
            batches=arguments.batch or [64 if device == "cuda" else 8],
            dtypes=arguments.dtype,
            image=arguments.image,
            seconds=arguments.seconds,
            device=device,
            cuda_graphs=arguments.cuda_graphs,
            progress=progress,
        )
    from fastvit.bench import plot

    machine = _machine_name(device)
    plot.save(rows, arguments.output, machine)
    if arguments.json:
        _print_json({"machine": machine, "plot": str(arguments.output), "rows": [asdict(r) for r in rows]})
        return 0
    _table(
        f"{arguments.model} on {machine}; random weights, a photograph",
        [
            "dtype",
            "batch",
            "eager\nimg/s",
            "fastvit\nimg/s",
            "speed-up",
            "of\npeak",
            "error\neager",
            "error\nfastvit",
            "pairs",
        ],
        [
            [
                r.dtype,
                str(r.batch),
                f"{r.eager_images_per_second:.1f}",
                f"{r.fastvit_images_per_second:.1f}",
                f"{r.speedup:.2f}x",
                _percent(r.fraction_of_peak),
                f"{r.eager_error:.1e}",
                f"{r.fastvit_error:.1e}",
                str(r.rounds),
            ]
            for r in rows
        ],
    )
    print("speed-up: median over interleaved pairs")
    print("of peak: fastvit's share of this machine's arithmetic peak, measured between the pairs")
    print("error: relative L2 against float64 with the unrounded weights, so low precisions include their rounding")
    print(f"plot: {arguments.output}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from fastvit.bench.run import check

    device = _set_machine(arguments)
    with _progress(arguments.json) as progress:
        result = check(
            arguments.model,
            library=arguments.library,
            dtypes=arguments.dtype,
            batch=arguments.batch,
            image_size=arguments.image_size,
            device=device,
            progress=progress,
        )
    verdict = "PASS" if result.passed else "FAIL"
    if arguments.json:
        rows = [{**asdict(r), "ratio": r.ratio, "passed": r.passed} for r in result.rows]
        _print_json({"model": arguments.model, "verdict": verdict, "rows": rows, "report": result.report.to_dict()})
        return 0 if result.passed else 1
    print(result.report)
    _table(
        f"{arguments.model}: relative L2 against float64 on the same rounded weights and images",
        ["dtype", "output", "eager", "fastvit", "ratio", "max\nabs", "cosine", ""],
        [
            [
                r.dtype,
                r.output,
                f"{r.eager_error:.1e}",
                f"{r.fastvit_error:.1e}",
                f"{r.ratio:.2f}",
                f"{r.max_abs:.1e}",
                f"{r.cosine:.8f}",
                "pass" if r.passed else "FAIL",
            ]
            for r in result.rows
        ],
    )
    if not result.report.replaced:
        print("nothing was replaced: fastvit does not know this model")
    print(f"{verdict} (f32: at most 1e-5, or as eager; lower precisions: at most 1.2x eager's error)")
    return 0 if result.passed else 1


def _attention(arguments: argparse.Namespace) -> int:
    from fastvit.bench.run import bench_attention

    device = _set_machine(arguments)
    with _progress(arguments.json) as progress:
        rows = bench_attention(
            tokens=arguments.tokens,
            heads=arguments.heads,
            head_dims=arguments.head_dim,
            dtypes=arguments.dtype,
            batch=arguments.batch,
            seconds=arguments.seconds,
            device=device,
            progress=progress,
        )
    if arguments.json:
        _print_json({"machine": _machine_name(device), "rows": [asdict(r) for r in rows]})
        return 0
    _table(
        f"packed qkv to output, batch {arguments.batch}, {arguments.heads} heads, on {_machine_name(device)}",
        [
            "dtype",
            "tokens",
            "head\ndim",
            "SDPA\nms",
            "fastvit\nms",
            "speed-up",
            "of\npeak",
            "error\nSDPA",
            "error\nfastvit",
        ],
        [
            [
                r.dtype,
                str(r.tokens),
                str(r.head_dim),
                f"{r.sdpa_milliseconds:.2f}",
                f"{r.fastvit_milliseconds:.2f}",
                f"{r.speedup:.2f}x",
                _percent(r.fraction_of_peak),
                f"{r.sdpa_error:.1e}",
                f"{r.fastvit_error:.1e}",
            ]
            for r in rows
        ],
    )
    return 0


def _check_output(path: Path) -> None:
    if path.suffix not in _PLOT_SUFFIXES:
        raise UsageError(f"output: {path} is no plot's name; accepted endings: {', '.join(_PLOT_SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"output: folder {path.parent} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"output: {path} can't be written")


# ---- Output ---------------------------------------------------------------------------------------


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.0f} %"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _table(title: str, header: list[str], rows: list[list[str]]) -> None:
    # Without vertical lines it fits a terminal of 80 columns.
    rich_table: Any = import_library("rich.table").Table(
        box=import_library("rich.box").SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for i, name in enumerate(header):
        rich_table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        rich_table.add_row(*row)
    # Without a terminal rich falls back to 80 columns and would cut cells.
    width = None if sys.stdout.isatty() else 160
    console: Any = import_library("rich.console").Console(width=width)
    # Above the table: as its title it would be wrapped to the table's width.
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(rich_table)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A progress bar on stderr."""
    if quiet:
        yield lambda _, __: None
        return
    rich_progress: Any = import_library("rich.progress")
    console = import_library("rich.console").Console(stderr=True)
    columns = ("{task.description}", rich_progress.BarColumn(), rich_progress.TimeElapsedColumn())
    with rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, done: bar.update(task, description=text, completed=done)
