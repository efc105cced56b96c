"""Levels: which ones a machine has, how one is chosen, and what arm64's are compiled to."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvit
from fastvit import _C, ops, reference
from tests import nasty
from tests.csrc import call
from tests.csrc.emulated import machines
from tests.csrc.emulated.driver import ROOT, Missing, require, setup_py
from tests.tolerances import assert_close

X86 = ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
ARM64 = ["neon", "neon_dotprod", "neon_bf16"]

# CPUID leaf 1 ECX, leaf 7.0 EBX, ECX, EDX and leaf 7.1 EAX; what the CPU's registers need the system to save.
SKYLAKE_X = (0x7FFEFBBF, 0xD39FFFFB, 0, 0, 0, 0xFF)
ICE_LAKE = (0x7FFAFBBF, 0xF2BF27EF, 0x40405F4E, 0xBC000410, 0, 0x2E7)
ALDER_LAKE = (0x7FFAFBFF, 0x239CA7EB, 0x98C027AC, 0xFC1CC410, 0x00400810, 0x207)
ZEN_3 = (0x7EF8320B, 0x219C97A9, 0x0040068C, 0x00000010, 0, 0x207)
ZEN_4 = (0xFFFA3203, 0xF1BF07AB, 0x00405FC6, 0x00000010, 0x20, 0xE7)
ZEN_5 = (0x7ED8320B, 0xF1BF97AB, 0x19405FCE, 0x10000110, 0x30, 0x2E7)
# Not dumps: Skylake-X with VNNI and BF16 added, and the bits of Sapphire Rapids' documented features.
COOPER_LAKE = (0x7FFEFBBF, 0xD39FFFFB, 1 << 11, 0, 1 << 5, 0xFF)
SAPPHIRE_RAPIDS = (
    0x7FFEFBFF,
    1 << 5 | 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31,
    1 << 11,
    1 << 22 | 1 << 24 | 1 << 25,
    1 << 4 | 1 << 5,
    0x602E7,
)
NEHALEM = (0x009CE3BD, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "words, without",
    [
        pytest.param(NEHALEM, X86[1:], id="Nehalem"),
        pytest.param(SKYLAKE_X, ["avx_vnni", "avx512_vnni", "avx512_bf16", "amx"], id="Skylake-X"),
        pytest.param(ICE_LAKE, ["avx_vnni", "avx512_bf16", "amx"], id="Ice Lake"),
        pytest.param(COOPER_LAKE, ["avx_vnni", "amx"], id="Cooper Lake"),
        pytest.param(ALDER_LAKE, X86[3:], id="Alder Lake"),
        pytest.param(SAPPHIRE_RAPIDS, [], id="Sapphire Rapids"),
        pytest.param(ZEN_3, X86[2:], id="Zen 3"),
        pytest.param(ZEN_4, ["avx_vnni", "amx"], id="Zen 4"),
        pytest.param(ZEN_5, ["amx"], id="Zen 5"),
    ],
)
def test_levels_of_x86(words: tuple[int, ...], without: list[str]) -> None:
    assert _C.x86_levels(*words) == [level for level in X86 if level not in without]


@pytest.mark.parametrize("words", [COOPER_LAKE, SAPPHIRE_RAPIDS, (*SAPPHIRE_RAPIDS[:-1], 0xE7)])
def test_bf16_dot_products_are_the_lesser_level_where_they_are_slow(words: tuple[int, ...]) -> None:
    intel, amd = (int.from_bytes(vendor, "little") for vendor in (b"Genu", b"Auth"))
    levels = _C.x86_levels(*words, leaf0_ebx=intel)
    assert levels.index("avx512_bf16") < levels.index("avx512_vnni")
    assert sorted(levels) == sorted(_C.x86_levels(*words, leaf0_ebx=amd))
    assert _C.x86_levels(*words, leaf0_ebx=amd) == _C.x86_levels(*words)
    assert _C.x86_levels(*ICE_LAKE, leaf0_ebx=intel) == _C.x86_levels(*ICE_LAKE)


@pytest.mark.parametrize(
    "xcr0, without",
    [
        (0x602E7 & ~0x20000, ["amx"]),  # no tile configuration
        (0x602E7 & ~0x40000, ["amx"]),  # no tile data
        (0x602E7 & ~0x20, X86[3:]),  # no opmask
        (0x60207, X86[3:]),  # no zmm
        (0x3, X86[1:]),  # no ymm
    ],
)
def test_what_the_system_does_not_save_is_not_used(xcr0: int, without: list[str]) -> None:
    words = (*SAPPHIRE_RAPIDS[:-1], xcr0)
    assert _C.x86_levels(*words) == [level for level in X86 if level not in without]


@pytest.mark.parametrize("bit", [12, 27, 28])  # FMA, OSXSAVE, AVX
def test_avx2_needs_fma_and_a_system_that_knows_avx(bit: int) -> None:
    assert "avx2" not in _C.x86_levels(ZEN_4[0] & ~(1 << bit), *ZEN_4[1:])


@pytest.mark.parametrize("word, bit", [(1, 16), (1, 17), (1, 30), (1, 31), (2, 11)])  # F, DQ, BW, VL, VNNI
def test_avx512_bf16_needs_each_part(word: int, bit: int) -> None:
    words = [w & ~(1 << bit) if i == word else w for i, w in enumerate(ZEN_4)]
    assert "avx512_bf16" not in _C.x86_levels(*words)


@pytest.mark.parametrize("bit", [22, 24, 25])  # AMX-BF16, AMX-TILE, AMX-INT8
def test_amx_needs_each_part(bit: int) -> None:
    words = [w & ~(1 << bit) if i == 3 else w for i, w in enumerate(SAPPHIRE_RAPIDS)]
    assert _C.x86_levels(*words) == X86[:-1]


# The features of Linux's /proc/cpuinfo in the order of the bits of AT_HWCAP, then of AT_HWCAP2.
HWCAP = """
    fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3
    sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"""
HWCAP2 = """
    dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16
    dgh rng bti"""
CORTEX_A72 = "fp asimd evtstrm crc32 cpuid"
GRAVITON_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
GRAVITON_3 = """
    fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3
    sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh
    rng"""
APPLE_M1 = """
    fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3
    asimddp sha512 asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg dcpodp flagm2 frint"""
APPLE_M2 = f"{APPLE_M1} i8mm bf16 bti"


@pytest.mark.parametrize(
    "features, best",
    [
        pytest.param(CORTEX_A72, 0, id="Cortex-A72"),
        pytest.param(GRAVITON_2, 1, id="Graviton 2"),
        pytest.param(GRAVITON_3, 2, id="Graviton 3"),
        pytest.param(APPLE_M1, 1, id="Apple M1"),
        pytest.param(APPLE_M2, 2, id="Apple M2"),
        pytest.param(APPLE_M2.replace("i8mm", ""), 1, id="no I8MM"),
        pytest.param(APPLE_M2.replace("bf16", ""), 1, id="no BF16"),
    ],
)
def test_levels_of_arm64(features: str, best: int) -> None:
    words = [
        sum(1 << bit for bit, name in enumerate(names.split()) if name in features.split()) for names in (HWCAP, HWCAP2)
    ]
    assert _C.arm64_levels(*words) == ARM64[: best + 1]


def test_supported_levels_go_from_the_plainest_to_the_best() -> None:
    supported = _C.supported_isas()
    known = X86 if supported[0] == "scalar" else ARM64
    assert supported[0] == known[0]
    if "avx512_bf16" in supported[:-1] and supported.index("avx512_bf16") < supported.index("avx512_vnni"):
        known = [*X86[:4], "avx512_bf16", "avx512_vnni", "amx"]  # Intel
    assert supported == [level for level in known if level in supported]
    assert _C.isa() in supported


@pytest.mark.parametrize("wanted", _C.supported_isas())
def test_the_environment_chooses_a_level(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIT_CPU_ISA", wanted)
    code = "from fastvit import _C; print(_C.isa())"
    isa = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    before = _C.isa()
    try:
        _C.set_isa(isa)
        why = fastvit.env()["cpu"]["isa_why"]
    finally:
        _C.set_isa(before)
    assert (isa, why) == (wanted, "FASTVIT_CPU_ISA asks for it")


_USES = """
import torch, fastvit
from fastvit import _C, ops, reference
from fastvit.nn import Block

block, x = Block(64, 2).eval(), torch.randn(1, 5, 64)
for use in (_C.isa, lambda: fastvit.ops.norm_linear(x, torch.eye(64)), lambda: block(x), lambda: block(x)):
    try:
        with torch.no_grad():
            use()
    except RuntimeError as error:
        print(error)
cpu = fastvit.env()["cpu"]
print(cpu["isa_why"] if cpu["isa"] is None else cpu["isa"])
_C.set_isa(_C.supported_isas()[0])
print(_C.isa(), *block(x).shape)
"""


@pytest.mark.parametrize("wanted", ["no such level", *sorted({*X86, *ARM64} - {*_C.supported_isas()})])
def test_a_level_that_cannot_be_had_is_an_error(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each use, not at import: what can be had must be told, and chosen."""
    monkeypatch.setenv("FASTVIT_CPU_ISA", wanted)
    *told, chosen = subprocess.run(
        [sys.executable, "-c", _USES], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    accepted = _C.supported_isas()
    message = f"FASTVIT_CPU_ISA='{wanted}' is not supported by this machine; accepted: {' '.join(accepted)}"
    assert told == [message] * 5
    assert chosen == f"{accepted[0]} 1 5 64"


def test_an_empty_level_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIT_CPU_ISA", "")
    code = "from fastvit import _C; print(_C.isa())"
    isa = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert isa == _C.supported_isas()[-1]


def test_every_level_that_is_compiled_can_be_found_and_is_documented() -> None:
    flags = setup_py().ISA_FLAGS
    known = {"x86_64": X86, "arm64": ARM64, "other": ["scalar"]}
    readme = (ROOT / "README.md").read_text()
    for architecture, levels in flags.items():
        assert list(levels) == [level for level in known[architecture] if level in levels]
        assert next(iter(levels.values())) == [], "the plainest level needs nothing"
        assert all(f"`{level}`" in readme for level in levels)


def test_compiled_levels_are_recorded() -> None:
    cpu = fastvit.env()["cpu"]
    assert set(cpu["supported_isas"]) <= set(cpu["compiled_isas"])


# ---- arm64, emulated ---------------------------------------------------------------------------------------------


@pytest.fixture(params=machines.ARM64, ids=lambda machine: machine.cpu)
def machine(request: pytest.FixtureRequest, arm64_driver: Path) -> machines.Machine:
    return request.param


def test_an_emulated_machine_offers_its_levels(machine: machines.Machine) -> None:
    driver = machines.start(machine)
    assert driver.supported_isas() == list(machine.levels)
    assert driver.isa() == machine.levels[-1]
    with pytest.raises(ValueError, match="isa='avx2' is not supported by this machine; accepted: neon"):
        driver.set_isa("avx2")
    driver.close()


def test_the_environment_chooses_an_emulated_level(arm64_driver: Path) -> None:
    driver = machines.start(machines.ARM64[-1], {"FASTVIT_CPU_ISA": "neon"})
    assert driver.isa() == "neon"
    driver.close()
    driver = machines.start(machines.ARM64[-1], {"FASTVIT_CPU_ISA": "avx2"})
    with pytest.raises(ValueError, match="FASTVIT_CPU_ISA='avx2' is not supported by this machine; accepted: neon"):
        driver.isa()
    driver.close()


def test_levels_of_arm64_agree(arm64_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = machines.running(machines.ARM64[-1])
    monkeypatch.setattr(call, "kernels", driver)
    x, w = torch.randn(7, 33), torch.randn(19, 33)
    results = {}
    for level in driver.supported_isas():
        driver.set_isa(level)
        results[level] = [
            call.norm_linear(x, w, norm="layer", compute=dtype) for dtype in (torch.float32, torch.bfloat16)
        ]
    assert torch.equal(results["neon"][0], results["neon_bf16"][0])
    assert all(map(torch.equal, results["neon"], results["neon_dotprod"]))
    assert not torch.equal(results["neon"][1], results["neon_bf16"][1])  # BFDOT was used


def test_the_driver_reports_errors_and_goes_on(arm64_driver: Path) -> None:
    driver = machines.start(machines.ARM64[0])
    out = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="attention: an argument is missing"):
        driver.call("attention", out)
    with pytest.raises(ValueError, match="attention: argument 1 has no such type"):
        driver.call("attention", 1)
    assert driver.isa() == "neon"
    driver.close()


def test_a_read_beyond_an_array_kills_the_driver(arm64_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "kernels", machines.start(machines.ARM64[0]))
    with pytest.raises(RuntimeError, match="norm_linear: the driver died"):
        call.norm_linear(torch.zeros(1, 8), torch.zeros(20, 8), torch.zeros(4))  # a bias of 4 for 20 columns


@pytest.mark.parametrize(
    "level, product, mac, macs, spilled",
    [
        ("neon", "ProductF32", r"fmla\tv\d+\.4s, v\d+\.4s, v\d+\.s\[0\]", 1, 0),
        # Elements of A must lie in one half of the registers here, and GCC 12 is a register short in eight steps.
        ("neon", "ProductI8", r"smlal2?\tv\d+\.4s, v\d+\.[48]h, v\d+\.h\[[01]\]", 2, 2),
        ("neon_dotprod", "ProductI8", r"sdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[0\]", 1, 0),
        ("neon_bf16", "VectorBF16", r"bfdot\tv\d+\.4s, v\d+\.8h, v\d+\.2h\[0\]", 1, 0),
    ],
)
def test_the_micro_kernel_of_arm64_multiplies_by_element_without_spills(
    arm64_driver: Path, level: str, product: str, mac: str, macs: int, spilled: int
) -> None:
    """macs: instructions per multiply-add of a vector.  spilled: loads and stores of vectors that spill."""
    objdump = "aarch64-linux-gnu-objdump"
    try:
        require(objdump, "binutils-aarch64-linux-gnu")
    except Missing as missing:
        pytest.skip(str(missing))
    listing = subprocess.run(
        [objdump, "-d", "--demangle", "--no-show-raw-insn", arm64_driver.parent / f"norm_linear.cpp.{level}.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = re.split(r"\n\n", listing)
    (kernel,) = [f for f in functions if re.match(rf"[0-9a-f]+ <.*micro_kernel<.*::{product}, .*Prefetch, 6, 4>", f)]
    # The longest stretch without a jump is the loop's body: eight steps of 24 multiply-adds.
    blocks = re.split(r"\n[^\n]*\t(?:b|b\.\w+|cbn?z|tbn?z|ret)\s[^\n]*", kernel)
    body = max(blocks, key=len).splitlines()
    done = [line for line in body if re.search(mac, line)]
    spills = [line for line in body if re.search(r"\t(?:ld|st)\w+\t[qdsv]\d+.*\[sp", line)]
    elements = [line for line in body if re.search(r"\tldu?r\ts\d+", line)]  # of A
    vectors = [line for line in body if re.search(r"\tld(?:p|u?r)\tq\d+", line) and line not in spills]  # of B
    assert len(done) == 8 * 24 * macs
    assert len(elements) == 8 * 6
    assert sum(2 if "\tldp\t" in line else 1 for line in vectors) == 8 * 4
    assert len(done) > 0.6 * len(body), f"{len(body)} instructions for {len(done)} multiply-adds"
    assert len(spills) <= spilled, "\n".join(spills)


def test_attention_prefetches_the_next_head() -> None:
    """Out of line, the function would be code without effect to GCC."""
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump, and code of x86")
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    run = re.compile(r"[0-9a-f]+ <_ZN7fastvit3cpu\d+(\w+?)12_GLOBAL__N_19AttentionINS1_\d+(\w+?)EE3runEv")
    bodies: dict[tuple[str, ...], str] = {}
    for function in listing.split("\n\n"):  # a loop of OpenMP's is a function of its own
        if name := run.match(function):
            bodies[name.groups()] = bodies.get(name.groups(), "") + function
    assert {level for level, _ in bodies} >= set(_C.supported_isas())
    assert [name for name, body in bodies.items() if "prefetch" not in body] == []


# ---- AMX ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def amx_listing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the compiler makes of an operator at the level amx, whether or not this machine has it."""
    setup = setup_py()
    cxx, flags = setup.compiler(), setup.ISA_FLAGS["x86_64"]["amx"]
    if cxx is None or setup.architecture(cxx) != "x86_64" or not setup.compiles([*cxx, *flags]):
        pytest.skip("no compiler that knows AMX")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed (Debian, Ubuntu: apt-get install binutils)")
    out = tmp_path_factory.mktemp("amx") / "kernel.o"
    source = setup.CSRC / "cpu" / "linear_residual.cpp"
    options = [*setup.CXX_FLAGS, *flags, "-fopenmp", "-DFASTVIT_ISA=amx", f"-I{setup.CSRC}"]
    subprocess.run([*cxx, *options, "-c", source, "-o", out], check=True)
    command = ["objdump", "-d", "--demangle", "--no-show-raw-insn", out]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("product, mac", [("ProductBF16", "tdpbf16ps"), ("ProductI8", "tdpbssd")])
def test_the_tile_kernel_loads_one_tile_per_product(amx_listing: str, product: str, mac: str) -> None:
    name = rf"[0-9a-f]+ <void .*tile_kernel<.*{product}, 2, 2, .*Meanwhile>"
    kernels = [body for body in amx_listing.split("\n\n") if re.match(name, body)]
    assert kernels, "the product of a residual uses them"
    for kernel in kernels:
        macs = [match.start() for match in re.finditer(mac, kernel)]
        assert len(macs) == 4, "2 x 2 tiles"
        assert "tilestored" not in kernel[macs[0] : macs[3]]
        assert kernel[macs[0] : macs[3]].count("tileloadd") == 2  # and one of A and one of B before the first
        assert kernel.count("tileloadd") == 4 + 4  # those of C, to go on with, and those of a block
        assert kernel.count("tileloaddt1") == 2  # those of A
        assert kernel.count("tilezero") == kernel.count("tilestored") == 4
        assert "ldtilecfg" not in kernel
    assert "ldtilecfg" in amx_listing
    assert "tilerelease" in amx_listing


def test_an_int8_patch_embedding_is_packed_anew_at_another_level():
    image = torch.randint(0, 256, (2, 3, 96, 96), generator=nasty.generator(), dtype=torch.uint8)
    weight = nasty.weight(96, 3, 16, 16).float()
    expected = reference.patch_embed(image, weight.double(), quantize="int8")
    before = _C.isa()
    try:
        for isa in (*_C.supported_isas(), _C.supported_isas()[0]):
            _C.set_isa(isa)
            assert_close(ops.patch_embed(image, weight, quantize="int8"), expected, eager=expected.float())
    finally:
        _C.set_isa(before)
