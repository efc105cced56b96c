// Torch tensors as Views, by their Python interface: csrc needs no torch header.

#pragma once

#include <pybind11/pybind11.h>

#include "cpu/types.h"

namespace fastvit {

View make_view(uintptr_t data, int dtype, const pybind11::tuple& sizes,
               const pybind11::tuple& strides);

// Throws std::invalid_argument for a dtype that no kernel takes.
View view_of(pybind11::handle tensor);

}  // namespace fastvit
