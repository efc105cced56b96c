// Chooses one build of the kernels for this machine (dispatch.cpp).

#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace fastvit::cpu {

// The operators of the current instruction set.
const Kernels& kernels();

// An operator made of others.
void self_attention(const SelfAttentionArgs& args);

const char* isa();
std::vector<std::string> supported_isas();  // from the plainest to the best
void set_isa(const std::string& name);      // throws std::invalid_argument

}  // namespace fastvit::cpu
