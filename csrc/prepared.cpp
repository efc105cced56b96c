#include "prepared.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/types.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastvit {
namespace {

// The state of Python objects as it was: types, instance dictionaries, and the dictionaries
// directly inside these. Only addresses are compared: nothing is hashed and nothing of Python runs,
// because a block's state is thousands of bytes, cold in cache at every call.
//
// It owns nothing, so that no cycle keeps a model alive; whoever owns it holds on to `kept` for as
// long, and no address can come to mean another object.
class Snapshot {
 public:
  // objects: the first one is the owner. dicts: more dictionaries. forwards: (type, its `forward`).
  // ignored: a key of dictionaries that may come and go. kept: takes what must be kept alive.
  Snapshot(const py::list& objects, const py::list& dicts, const py::list& forwards,
           const py::str& ignored, py::list kept)
      : ignored_(ignored.ptr()) {
    kept.append(ignored);
    for (const py::handle object : objects) {
      const auto dict = py::getattr(object, "__dict__").cast<py::dict>();
      objects_.push_back({object.ptr(), Py_TYPE(object.ptr()), dict.ptr()});
      kept.append(py::type::of(object));
      if (objects_.size() > 1) {
        kept.append(object);
        kept.append(dict);
      }
      add(dict, kept);
      for (const auto& [key, value] : dict) {
        if (PyDict_Check(value.ptr())) add(py::reinterpret_borrow<py::dict>(value), kept);
      }
    }
    for (const py::handle dict : dicts) {
      kept.append(dict);
      add(py::reinterpret_borrow<py::dict>(dict), kept);
    }
    for (const py::handle pair : forwards) {
      kept.append(pair);
      forwards_.emplace_back(PyTuple_GetItem(pair.ptr(), 0), PyTuple_GetItem(pair.ptr(), 1));
    }
  }

  bool holds(py::handle owner) const {
    if (owner.ptr() != objects_.front().self) return false;
    for (const Object& object : objects_) {
      if (Py_TYPE(object.self) != object.type) return false;
      PyObject* dict = PyObject_GenericGetDict(object.self, nullptr);
      Py_XDECREF(dict);  // the object keeps it
      if (dict != object.dict) return false;
    }
    for (const Dict& dict : dicts_) {
      if (!same(dict)) return false;
    }
    static PyObject* const name = PyUnicode_InternFromString("forward");
    for (const auto& [type, expected] : forwards_) {
      PyObject* forward = PyObject_GetAttr(type, name);
      if (forward == nullptr) PyErr_Clear();
      Py_XDECREF(forward);  // the type keeps it
      if (forward != expected) return false;
    }
    return true;
  }

 private:
  struct Object {
    PyObject* self;
    PyTypeObject* type;
    PyObject* dict;
  };
  struct Dict {
    PyObject* self;
    size_t first, end;  // of items_
  };

  void add(const py::dict& dict, py::list& kept) {
    const size_t first = items_.size();
    for (const auto& [key, value] : dict) {
      if (key.ptr() == ignored_) continue;
      kept.append(key);
      kept.append(value);
      items_.emplace_back(key.ptr(), value.ptr());
    }
    dicts_.push_back({dict.ptr(), first, items_.size()});
  }

  bool same(const Dict& dict) const {
    size_t at = dict.first;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict.self, &position, &key, &value)) {
      if (key == ignored_) continue;
      if (at == dict.end || items_[at].first != key || items_[at].second != value) return false;
      ++at;
    }
    return at == dict.end;
  }

  PyObject* ignored_;
  std::vector<Object> objects_;
  std::vector<Dict> dicts_;
  std::vector<std::pair<PyObject*, PyObject*>> items_, forwards_;
};

bool same(const View& a, const View& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.size[i] != b.size[i] || a.stride[i] != b.stride[i]) return false;
  }
  return true;
}

// What an operand was copied from, as it was then: a vector, compared whole, or a weight behind a
// quantised one, of which a hash of some elements is.
class Guard {
 public:
  explicit Guard(py::handle tensor)
      : tensor_(tensor.ptr()), view_(view_of(tensor)), version_(version()) {
    if (view_.ndim == 1) {
      values_.assign(bytes(), size());
    } else {
      print_ = fingerprint(view_);
    }
  }

  bool holds() const {
    if (version() != version_ || !same(view_of(tensor_), view_)) return false;
    if (view_.ndim == 1) return values_.compare(0, size(), bytes(), size()) == 0;
    return fingerprint(view_) == print_;
  }

 private:
  const char* bytes() const { return static_cast<const char*>(view_.data); }
  size_t size() const {
    return static_cast<size_t>(view_.size[0]) * (view_.dtype == DType::kF32 ? 4 : 2);
  }

  // Counts changes in place; a tensor made in inference mode has none, and gives -1.
  int64_t version() const {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    PyObject* value = PyObject_GetAttr(tensor_, name);
    const int64_t count = value == nullptr ? -1 : PyLong_AsLongLong(value);
    if (value == nullptr) PyErr_Clear();
    Py_XDECREF(value);
    return count;
  }

  PyObject* tensor_;
  View view_;
  int64_t version_;
  uint64_t print_ = 0;
  std::string values_;
};

// Both halves of a pre-norm block, for inference on the CPU. `run` is true to what fastvit.ops
// checked once, or does nothing.
class PreparedBlock {
 public:
  // operands: tensors or None, in the order of Operand. guards: what operands are copies of, the
  // weights behind int8 ones among them. compute: the dtype of the hidden states. rope_prefix: how
  // many tokens are never rotated; -1: as many as there are beyond the angles.
  PreparedBlock(Snapshot snapshot, const std::vector<py::object>& operands,
                const std::vector<py::object>& guards, int compute, int64_t num_heads, float scale,
                bool rope_interleaved, int64_t rope_prefix, std::pair<int, float> norm1,
                std::pair<int, float> norm2, int activation, int64_t most_scratch)
      : snapshot_(std::move(snapshot)),
        guards_(guards.begin(), guards.end()),
        compute_(static_cast<Compute>(compute)),
        num_heads_(num_heads),
        scale_(scale),
        rope_interleaved_(rope_interleaved),
        rope_prefix_(rope_prefix),
        norm1_(norm1),
        norm2_(norm2),
        activation_(static_cast<Activation>(activation)),
        most_scratch_(most_scratch) {
    if (operands.size() != kOperands) throw std::invalid_argument("operands: one is missing");
    for (int i = 0; i < kOperands; ++i) {
      if (operands[i].is_none()) continue;
      tensors_[i] = operands[i].ptr();
      views_[i] = view_of(operands[i]);
    }
  }

  // out = block(x), x (B, N, D) and out the first tokens of that; false if anything is not as it
  // was, or x can't be served. rope_cos, rope_sin: None, or (P, head_dim).
  bool run(py::handle block, py::handle out, py::handle x, py::handle rope_cos, py::handle rope_sin,
           int num_threads) const {
    if (!snapshot_.holds(block)) return false;
    const bool rotates = !rope_cos.is_none();
    View in, result, cos, sin;
    try {
      for (int i = 0; i < kOperands; ++i) {
        if (tensors_[i] != nullptr && !same(view_of(tensors_[i]), views_[i])) return false;
      }
      for (const Guard& guard : guards_) {
        if (!guard.holds()) return false;
      }
      in = view_of(x);
      result = view_of(out);
      if (rotates) cos = view_of(rope_cos), sin = view_of(rope_sin);
    } catch (const std::exception&) {  // a tensor without memory, or of a dtype for no kernel
      return false;
    }
    const View &proj = views_[kProjWeight], &fc1 = views_[kFc1Weight];
    const int64_t features = proj.size[0];
    const DType dtype = compute_ == Compute::kF32 ? DType::kF32 : DType::kBF16;
    if (in.ndim != 3 || in.dtype != dtype || in.size[2] != features) return false;
    const int64_t samples = in.size[0], tokens = in.size[1],
                  bytes = in.dtype == DType::kF32 ? 4 : 2;
    if (samples * tokens == 0 || in.stride[2] != 1 || in.stride[1] != features ||
        in.stride[0] != tokens * features || 4 * tokens * proj.size[1] * bytes > most_scratch_) {
      return false;
    }
    const int64_t queries = result.size[1];
    if (rotates && (!turns(cos, tokens) || !turns(sin, tokens) || cos.size[0] != sin.size[0] ||
                    queries != tokens)) {
      return false;
    }
    for (View* each : {&in, &result}) {
      each->ndim = 2;
      each->size[0] *= each->size[1], each->size[1] = features;
      each->stride[0] = features, each->stride[1] = 1;
    }
    const cpu::SelfAttentionArgs first{result,
                                       in,
                                       {get(kQWeight), get(kKWeight), get(kVWeight)},
                                       {get(kQScale), get(kKScale), get(kVScale)},
                                       {get(kQBias), get(kKBias), get(kVBias)},
                                       get(kKWeight) != nullptr ? 3 : 1,
                                       proj,
                                       get(kProjScale),
                                       get(kProjBias),
                                       get(kNorm1Weight),
                                       get(kNorm1Bias),
                                       static_cast<Norm>(norm1_.first),
                                       norm1_.second,
                                       nullptr,
                                       scale_,
                                       rotates ? &cos : nullptr,
                                       rotates ? &sin : nullptr,
                                       rope_interleaved_,
                                       get(kLayerScale1),
                                       nullptr,
                                       samples,
                                       num_heads_,
                                       compute_,
                                       num_threads,
                                       queries};
    const cpu::MlpArgs second{result,
                              result,
                              fc1,
                              views_[kFc2Weight],
                              get(kFc1Scale),
                              get(kFc2Scale),
                              get(kFc1Bias),
                              get(kFc2Bias),
                              get(kNorm2Weight),
                              get(kNorm2Bias),
                              static_cast<Norm>(norm2_.first),
                              norm2_.second,
                              activation_,
                              get(kLayerScale2),
                              nullptr,
                              queries,
                              fc1.size[0] / (activation_ == Activation::kSwiglu ? 2 : 1),
                              compute_,
                              num_threads};
    const py::gil_scoped_release release;
    cpu::self_attention(first);
    cpu::kernels().mlp(second);
    return true;
  }

 private:
  enum Operand {
    kNorm1Weight,
    kNorm1Bias,
    kQWeight,  // or all three, packed
    kQScale,   // of an int8 weight
    kQBias,
    kKWeight,
    kKScale,
    kKBias,
    kVWeight,
    kVScale,
    kVBias,
    kProjWeight,
    kProjScale,
    kProjBias,
    kLayerScale1,
    kNorm2Weight,
    kNorm2Bias,
    kFc1Weight,
    kFc1Scale,
    kFc1Bias,
    kFc2Weight,
    kFc2Scale,
    kFc2Bias,
    kLayerScale2,
    kOperands
  };

  // Can q and k of so many tokens be rotated by this?
  bool turns(const View& table, int64_t tokens) const {
    const int64_t head_dim = views_[kProjWeight].size[1] / num_heads_;
    return table.ndim == 2 && table.stride[1] == 1 && table.size[1] == head_dim &&
           head_dim % 2 == 0 && (table.dtype == DType::kF32 || table.dtype == DType::kBF16) &&
           (rope_prefix_ < 0 ? table.size[0] <= tokens : table.size[0] + rope_prefix_ == tokens);
  }

  const View* get(Operand i) const { return tensors_[i] != nullptr ? &views_[i] : nullptr; }

  Snapshot snapshot_;
  PyObject* tensors_[kOperands] = {};
  View views_[kOperands] = {};
  std::vector<Guard> guards_;
  Compute compute_;
  int64_t num_heads_;
  float scale_;
  bool rope_interleaved_;
  int64_t rope_prefix_;
  std::pair<int, float> norm1_, norm2_;
  Activation activation_;
  int64_t most_scratch_;
};

}  // namespace

void bind_prepared(py::module_& m) {
  py::class_<Snapshot>(
      m, "Snapshot", py::module_local(),
      "Types, instance dictionaries and the dictionaries in them, as they are now.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::str&, py::list>(),
           py::arg("objects"), py::arg("dicts"), py::arg("forwards"), py::arg("ignored"),
           py::arg("kept"))
      .def("holds", &Snapshot::holds, py::arg("owner"));
  py::class_<PreparedBlock>(m, "PreparedBlock", py::module_local(),
                            "A block's call with its arguments checked. It owns no Python object.")
      .def(py::init<Snapshot, const std::vector<py::object>&, const std::vector<py::object>&, int,
                    int64_t, float, bool, int64_t, std::pair<int, float>, std::pair<int, float>,
                    int, int64_t>(),
           py::arg("snapshot"), py::arg("operands"), py::arg("guards"), py::arg("compute"),
           py::arg("num_heads"), py::arg("scale"), py::arg("rope_interleaved"),
           py::arg("rope_prefix"), py::arg("norm1"), py::arg("norm2"), py::arg("activation"),
           py::arg("most_scratch"))
      .def("run", &PreparedBlock::run, py::arg("block"), py::arg("out"), py::arg("x"),
           py::arg("rope_cos"), py::arg("rope_sin"), py::arg("num_threads"));
}

}  // namespace fastvit
