// Torch tensors as Views, by their Python interface: csrc needs no torch header.

#pragma once

#include <pybind11/pybind11.h>

#include "cpu/types.h"

namespace fastvit {

// Throws std::invalid_argument for a dtype or a number of dimensions that no kernel takes.
View view_of(pybind11::handle tensor);

}  // namespace fastvit
