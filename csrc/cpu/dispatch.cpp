// The dispatch table: every level that was compiled, looked up in what the machine supports.
// FASTVIT_CPU_ISA chooses another.
//
// The build defines FASTVIT_LEVELS(X) as X(level) X(level) ... of the levels that it compiled.

#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "machine.h"

namespace fastvit::cpu {

#define FASTVIT_DECLARE(level)                                                        \
  namespace level {                                                                   \
  void patch_embed(const PatchEmbedArgs&);                                            \
  void norm_linear(const NormLinearArgs&);                                            \
  void attention(const AttentionArgs&);                                               \
  void rotate(const RotateArgs&);                                                     \
  void linear_residual(const LinearResidualArgs&);                                    \
  void mlp(const MlpArgs&);                                                           \
  void pool(const PoolArgs&);                                                         \
  void quantize_rows(const QuantizeArgs&);                                            \
  void pack_weight(const PackArgs&);                                                  \
  int64_t packed_bytes(int64_t n, int64_t k);                                         \
  double peak(Compute, int num_threads, double seconds);                              \
  constexpr Kernels kKernels{patch_embed,     norm_linear,  attention, rotate,        \
                             linear_residual, mlp,          pool,      quantize_rows, \
                             pack_weight,     packed_bytes, peak};                    \
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
    for (const std::string& name : machine_levels()) {
      if (name == "amx" && !tile_registers_granted()) continue;
      for (const Level& level : kCompiled) {
        if (name == level.name) levels_.push_back(&level);
      }
    }
    const char* wanted = std::getenv("FASTVIT_CPU_ISA");
    if (wanted != nullptr && *wanted != 0) {
      current_ = find(wanted);
      if (current_ == nullptr) refused_ = wanted;
    } else {
      current_ = levels_.back();  // the plainest level needs nothing
    }
  }

  const Level* find(const std::string& name) const {
    for (const Level* level : levels_) {
      if (name == level->name) return level;
    }
    return nullptr;
  }

  const std::vector<const Level*>& levels() const { return levels_; }
  // A name in FASTVIT_CPU_ISA that is not accepted must not break the import, but all that runs.
  const Level& current() const {
    const Level* level = current_.load(std::memory_order_relaxed);
    if (level == nullptr) throw std::runtime_error(refusal("FASTVIT_CPU_ISA", refused_));
    return *level;
  }
  std::string refusal(const std::string& argument, const std::string& name) const {
    std::string accepted;
    for (const Level* level : levels_) accepted += std::string(" ") + level->name;
    return argument + "='" + name + "' is not supported by this machine; accepted:" + accepted;
  }
  void choose(const Level* level) { current_.store(level, std::memory_order_relaxed); }

 private:
  std::vector<const Level*> levels_;  // supported here
  std::atomic<const Level*> current_{nullptr};
  std::string refused_;  // what FASTVIT_CPU_ISA asks for in vain
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
  if (level == nullptr) throw std::invalid_argument(table().refusal("isa", name));
  table().choose(level);
}

}  // namespace fastvit::cpu
