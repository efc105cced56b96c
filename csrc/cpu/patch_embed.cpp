// fastvit: per-isa
#include "product.h"
namespace fastvit::cpu::FASTVIT_ISA {
void patch_embed(const PatchEmbedArgs&) {}
}
