// The dispatch table: every level that was compiled, looked up in what the machine supports.
// FASTVIT_CPU_ISA lowers the choice.
//
// The build defines FASTVIT_LEVELS(X) as X(level) X(level) ... of the levels that it compiled, from
// the plainest to the best.

#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "machine.h"

namespace fastvit::cpu {

#define FASTVIT_DECLARE(level)                                                         \
  namespace level {                                                                    \
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
FASTVIT_LEVELS(FASTVIT_DECLARE)
#undef FASTVIT_DECLARE

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
};

#define FASTVIT_ENTRY(level) {#level, &level::kKernels},
constexpr Level kCompiled[] = {FASTVIT_LEVELS(FASTVIT_ENTRY)};
#undef FASTVIT_ENTRY

class Table {
 public:
  Table() {
    const std::vector<std::string> machine = machine_levels();
    for (const Level& level : kCompiled) {
      const std::string name = level.name;
      if (std::find(machine.begin(), machine.end(), name) == machine.end()) continue;
      if (name == "amx" && !tile_registers_granted()) continue;
      levels_.push_back(&level);
    }
    current_ = levels_.back();  // the plainest level needs nothing
    // An unknown or unsupported name must not break the import: the best level stays.
    if (const char* wanted = std::getenv("FASTVIT_CPU_ISA")) {
      if (const Level* level = find(wanted)) current_ = level;
    }
  }

  const Level* find(const std::string& name) const {
    for (const Level* level : levels_) {
      if (name == level->name) return level;
    }
    return nullptr;
  }

  const std::vector<const Level*>& levels() const { return levels_; }
  const Level& current() const { return *current_.load(std::memory_order_relaxed); }
  void choose(const Level* level) { current_.store(level, std::memory_order_relaxed); }

 private:
  std::vector<const Level*> levels_;  // supported here
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
  for (const Level* level : table().levels()) names.emplace_back(level->name);
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
