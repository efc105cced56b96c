// fastvit: per-isa
#include "product.h"
namespace fastvit::cpu::FASTVIT_ISA {
void attention(const AttentionArgs&) {}
}
