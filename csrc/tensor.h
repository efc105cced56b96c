// Torch tensors as Views, by their Python interface: csrc needs no torch header.

#pragma once

#include <pybind11/pybind11.h>

#include "cpu/types.h"

namespace fastvit {

// Throws std::invalid_argument for a dtype or a number of dimensions that no kernel takes.
View view_of(pybind11::handle tensor);

// A hash of at most 64 elements spread over a contiguous array: it tells apart the weights before
// and after anything that changes most of them, such as `.data` written behind a version counter.
uint64_t fingerprint(const View& view);

}  // namespace fastvit
