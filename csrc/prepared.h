// The call of a transformer block, prepared: what the slow way (fastvit.adapters) read and checked
// once, and a cheap proof that it would read the same again.

#pragma once

#include <pybind11/pybind11.h>

namespace fastvit {

void bind_prepared(pybind11::module_& module);

}  // namespace fastvit
