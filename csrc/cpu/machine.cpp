// Support takes two answers: CPUID says that the core decodes the instructions, XGETBV says that
// the operating system saves the registers they use. On arm64 the operating system gives both.

#include "machine.h"

#include <algorithm>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fastvit::cpu {
namespace {

using Features = uint32_t;

struct Level {
  const char* name;
  Features needs;
};

template <int N>
std::vector<std::string> supported(const Level (&table)[N], Features features) {
  std::vector<std::string> names;
  for (const Level& level : table) {
    if ((level.needs & ~features) == 0) names.emplace_back(level.name);
  }
  return names;
}

bool bit(uint64_t word, int i) { return word >> i & 1; }

// ---- x86-64 -------------------------------------------------------------------------------------

enum X86 : Features {
  kAvx2 = 1 << 0,     // with FMA
  kAvxVnni = 1 << 1,  // u8 x s8 dot products in ymm
  kAvx512 = 1 << 2,   // F, BW, VL and DQ
  kAvx512Vnni = 1 << 3,
  kAvx512Bf16 = 1 << 4,
  kAmx = 1 << 5,  // tiles, with bf16 and int8 products
};

// Intel's cores multiply by VDPBF16PS at half the rate of f32 (measured: ViT-B/16 takes 1.6 times
// as long as by avx512_vnni, which multiplies bf16 as f32), so there avx512_bf16 is the lesser
// level.
constexpr uint32_t kIntel = 0x756e6547;  // "Genu"

constexpr Level kX86Levels[] = {
    {"scalar", 0},
    {"avx2", kAvx2},
    {"avx_vnni", kAvx2 | kAvxVnni},
    {"avx512", kAvx2 | kAvx512},
    {"avx512_vnni", kAvx2 | kAvx512 | kAvx512Vnni},
    {"avx512_bf16", kAvx2 | kAvx512 | kAvx512Vnni | kAvx512Bf16},
    {"amx", kAvx2 | kAvx512 | kAvx512Vnni | kAvx512Bf16 | kAmx},
};

// ---- arm64 --------------------------------------------------------------------------------------

enum Arm64 : Features {
  kDotprod = 1 << 0,
  kBf16 = 1 << 1,
  kI8mm = 1 << 2,
};

constexpr Level kArm64Levels[] = {
    {"neon", 0},
    {"neon_dotprod", kDotprod},
    {"neon_bf16", kDotprod | kBf16 | kI8mm},
};

// Bits of AT_HWCAP and AT_HWCAP2, which are part of Linux's ABI.
constexpr int kHwcapAsimddp = 20, kHwcap2I8mm = 13, kHwcap2Bf16 = 14;

}  // namespace

std::vector<std::string> levels(const X86Words& w) {
  const bool osxsave = bit(w.leaf1_ecx, 27);
  const auto saves = [&](uint64_t state) { return osxsave && (w.xcr0 & state) == state; };
  const bool ymm = saves(0x6);        // SSE and AVX
  const bool zmm = saves(0xe6);       // ... and opmask, upper halves, zmm16-31
  const bool tiles = saves(0x60000);  // tile configuration and data

  Features features = 0;
  const auto add = [&](X86 feature, bool present) {
    if (present) features |= feature;
  };
  add(kAvx2, ymm && bit(w.leaf1_ecx, 28) && bit(w.leaf1_ecx, 12) && bit(w.leaf7_ebx, 5));
  add(kAvxVnni, ymm && bit(w.leaf7_1_eax, 4));
  add(kAvx512, zmm && bit(w.leaf7_ebx, 16) && bit(w.leaf7_ebx, 17) && bit(w.leaf7_ebx, 30) &&
                   bit(w.leaf7_ebx, 31));
  add(kAvx512Vnni, zmm && bit(w.leaf7_ecx, 11));
  add(kAvx512Bf16, zmm && bit(w.leaf7_1_eax, 5));
  add(kAmx, tiles && bit(w.leaf7_edx, 22) && bit(w.leaf7_edx, 24) && bit(w.leaf7_edx, 25));
  std::vector<std::string> names = supported(kX86Levels, features);
  if (w.leaf0_ebx == kIntel && features & kAvx512Bf16) {
    std::swap(*std::find(names.begin(), names.end(), "avx512_vnni"),
              *std::find(names.begin(), names.end(), "avx512_bf16"));
  }
  return names;
}

std::vector<std::string> levels(const Arm64Words& w) {
  Features features = 0;
  const auto add = [&](Arm64 feature, bool present) {
    if (present) features |= feature;
  };
  add(kDotprod, bit(w.hwcap, kHwcapAsimddp));
  add(kBf16, bit(w.hwcap2, kHwcap2Bf16));
  add(kI8mm, bit(w.hwcap2, kHwcap2I8mm));
  return supported(kArm64Levels, features);
}

#if defined(__x86_64__)

std::vector<std::string> machine_levels() {
  X86Words words{};
  unsigned a, b, c, d;
  if (__get_cpuid(0, &a, &b, &c, &d)) words.leaf0_ebx = b;
  if (__get_cpuid(1, &a, &b, &c, &d)) words.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    words.leaf7_ebx = b, words.leaf7_ecx = c, words.leaf7_edx = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) words.leaf7_1_eax = a;
  }
  if (bit(words.leaf1_ecx, 27)) {  // without OSXSAVE, XGETBV is no instruction
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    words.xcr0 = static_cast<uint64_t>(high) << 32 | low;
  }
  return levels(words);
}

#elif defined(__aarch64__)

std::vector<std::string> machine_levels() {
  Arm64Words words{};
#if defined(__linux__)
  words = {getauxval(AT_HWCAP), getauxval(AT_HWCAP2)};
#elif defined(__APPLE__)
  const auto has = [](const char* name) -> uint64_t {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  words.hwcap = has("hw.optional.arm.FEAT_DotProd") << kHwcapAsimddp;
  words.hwcap2 = has("hw.optional.arm.FEAT_I8MM") << kHwcap2I8mm | has("hw.optional.arm.FEAT_BF16")
                                                                       << kHwcap2Bf16;
#endif
  return levels(words);
}

#else

std::vector<std::string> machine_levels() { return {"scalar"}; }

#endif

bool tile_registers_granted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  static const bool granted = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace fastvit::cpu
