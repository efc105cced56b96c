// The dispatch table: every instruction set that was compiled, tested against the machine at load.
//
// Support takes two answers: CPUID says that the core decodes the instructions, XGETBV says that
// the operating system saves the registers they use. FASTVIT_CPU_ISA lowers the choice.
//
// The build defines FASTVIT_HAVE_<ISA> for every set that it compiled.

#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastvit::cpu {

#define FASTVIT_BUILD(isa)                                                             \
  namespace isa {                                                                      \
  void patch_embed(const PatchEmbedArgs&);                                             \
  void norm_linear(const NormLinearArgs&);                                             \
  void attention(const AttentionArgs&);                                                \
  void linear_residual(const LinearResidualArgs&);                                     \
  void mlp(const MlpArgs&);                                                            \
  void pool(const PoolArgs&);                                                          \
  void quantize_rows(const QuantizeArgs&);                                             \
  double peak(Compute, int num_threads, double seconds);                               \
  constexpr Kernels kKernels{patch_embed, norm_linear, attention,     linear_residual, \
                             mlp,         pool,        quantize_rows, peak};           \
  }

FASTVIT_BUILD(scalar)
#ifdef FASTVIT_HAVE_AVX2
FASTVIT_BUILD(avx2)
#endif
#ifdef FASTVIT_HAVE_AVX512
FASTVIT_BUILD(avx512)
#endif
#ifdef FASTVIT_HAVE_AVX512_BF16
FASTVIT_BUILD(avx512_bf16)
#endif

#undef FASTVIT_BUILD

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

struct Machine {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;

  Machine() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1;
    if (!osxsave || !avx || !fma) return;

    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    const bool saves_ymm = (lo & 0x06) == 0x06;  // SSE and AVX state
    const bool saves_zmm = (lo & 0xe6) == 0xe6;  // ... and opmask, upper halves, zmm16-31

    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned subleaves = a;
    avx2 = saves_ymm && (b >> 5 & 1);
    const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
    avx512 = avx2 && saves_zmm && f && dq && bw && vl;
    const bool vnni = c >> 11 & 1;
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
      avx512_bf16 = avx512 && vnni && (a >> 5 & 1);
    }
#endif
  }
};

class Table {
 public:
  Table() {
    [[maybe_unused]] const Machine machine;
    levels_.push_back({"scalar", &scalar::kKernels, true});
#ifdef FASTVIT_HAVE_AVX2
    levels_.push_back({"avx2", &avx2::kKernels, machine.avx2});
#endif
#ifdef FASTVIT_HAVE_AVX512
    levels_.push_back({"avx512", &avx512::kKernels, machine.avx512});
#endif
#ifdef FASTVIT_HAVE_AVX512_BF16
    levels_.push_back({"avx512_bf16", &avx512_bf16::kKernels, machine.avx512_bf16});
#endif
    for (const Level& level : levels_) {
      if (level.supported) current_ = &level;
    }
    // An unknown or unsupported name must not break the import: the best level stays.
    if (const char* wanted = std::getenv("FASTVIT_CPU_ISA")) {
      if (const Level* level = find(wanted)) current_ = level;
    }
  }

  const Level* find(const std::string& name) const {
    for (const Level& level : levels_) {
      if (level.supported && name == level.name) return &level;
    }
    return nullptr;
  }

  const std::vector<Level>& levels() const { return levels_; }
  const Level& current() const { return *current_.load(std::memory_order_relaxed); }
  void choose(const Level* level) { current_.store(level, std::memory_order_relaxed); }

 private:
  std::vector<Level> levels_;
  std::atomic<const Level*> current_{nullptr};
};

Table& table() {
  static Table instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return *table().current().kernels; }

const char* isa() { return table().current().name; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Level& level : table().levels()) {
    if (level.supported) names.emplace_back(level.name);
  }
  return names;
}

void set_isa(const std::string& name) {
  const Level* level = table().find(name);
  if (level == nullptr) {
    std::string accepted;
    for (const std::string& each : supported_isas()) accepted += " " + each;
    throw std::invalid_argument("isa='" + name +
                                "' is not supported by this machine; accepted:" + accepted);
  }
  table().choose(level);
}

}  // namespace fastvit::cpu
