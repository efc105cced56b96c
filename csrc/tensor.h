// Torch tensors as Views, by DLPack or their Python interface: csrc needs no torch header. A bound
// function that takes a View takes a tensor; one that takes a pointer to it takes None as well.

#pragma once

#include <pybind11/pybind11.h>

#include "cpu/types.h"

namespace fastvit {

// Throws std::invalid_argument for a dtype or a number of dimensions that no kernel takes.
View view_of(pybind11::handle tensor);

// What an operator's checks depend on, as bytes: of a plain tensor on the CPU its dtype and shape,
// of None, numbers, strings, torch dtypes, and lists and tuples of these their values. None if an
// argument is anything else, or a tensor without elements.
pybind11::object kinds_of(pybind11::tuple arguments);

// A hash of where an array lies, its dtype, sizes and strides, and at most 64 elements spread over
// it: it tells apart the weights before and after anything that changes most of them, such as
// `.data` written behind a version counter.
uint64_t fingerprint(const View& view);

}  // namespace fastvit

namespace pybind11::detail {

template <>
class type_caster<fastvit::View> {
 public:
  static constexpr auto name = const_name("torch.Tensor");
  template <class T>
  using cast_op_type = detail::cast_op_type<T>;

  bool load(handle source, bool) {
    given_ = !source.is_none();
    if (given_) view_ = fastvit::view_of(source);
    return true;
  }

  operator fastvit::View*() { return given_ ? &view_ : nullptr; }
  operator fastvit::View&() {
    if (!given_) throw reference_cast_error();
    return view_;
  }

 private:
  fastvit::View view_{};
  bool given_ = false;
};

}  // namespace pybind11::detail
