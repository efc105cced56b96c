// The kernels of csrc/cpu in a program of its own, without Python: it answers requests on standard
// input until that ends. Built for another instruction set it runs under an emulator, built with
// other definitions it runs here. tests/csrc/emulated/driver.py is the other side.
//
//   request   name, arrays (size, bytes), arguments (a tag, then a value)
//   answer    0 and all arrays as the call left them, or a text; 1 and an error's text
//
// Integers are little-endian and 64 bits wide, texts and bytes follow their length.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "cpu/calls.h"
#include "cpu/dispatch.h"

namespace fastvit {
namespace {

bool read_bytes(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

int64_t read_integer() {
  int64_t value;
  if (!read_bytes(&value, sizeof value)) std::exit(1);  // the other side died in mid-request
  return value;
}

std::string read_text() {
  std::string text(read_integer(), '\0');
  if (!read_bytes(text.data(), text.size())) std::exit(1);
  return text;
}

void write_integer(int64_t value) { std::fwrite(&value, sizeof value, 1, stdout); }

void answer(int64_t status, const std::string& text) {
  write_integer(status);
  write_integer(static_cast<int64_t>(text.size()));
  std::fwrite(text.data(), 1, text.size(), stdout);
}

// Memory that ends where a page ends, before one that can't be touched: a kernel that reads or
// writes a vector beyond the last element dies.
class Array {
 public:
  explicit Array(int64_t bytes) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), used = (bytes + page - 1) / page * page;
    size_ = used + page;
    base_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + used, page, PROT_NONE) != 0) {
      throw std::runtime_error("no memory for an array");
    }
    data_ = base_ + used - bytes;
    if (!read_bytes(data_, bytes)) std::exit(1);
  }
  ~Array() { munmap(base_, size_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char *base_, *data_;
  int64_t bytes_, size_;
};

// The arrays and arguments of one request.
class Request {
 public:
  Request() : name_(read_text()) {
    for (int64_t n = read_integer(); n > 0; --n) arrays_.emplace_back(read_integer());
    for (int64_t n = read_integer(); n > 0; --n) {
      Argument argument{static_cast<Tag>(read_integer()), {}, 0, 0, {}};
      switch (argument.tag) {
        case Tag::kNone:
          break;
        case Tag::kInteger:
          argument.integer = read_integer();
          break;
        case Tag::kReal:
          if (!read_bytes(&argument.real, sizeof argument.real)) std::exit(1);
          break;
        case Tag::kText:
          argument.text = read_text();
          break;
        case Tag::kView:
          argument.view = read_view();
          break;
      }
      arguments_.push_back(argument);
    }
  }

  const std::string& name() const { return name_; }
  const std::deque<Array>& arrays() const { return arrays_; }

  template <class T>
  T take() {
    if (next_ == arguments_.size()) throw std::runtime_error(name_ + ": an argument is missing");
    const Argument& argument = arguments_[next_++];
    const auto require = [&](Tag tag) {
      if (argument.tag != tag) {
        throw std::runtime_error(name_ + ": argument " + std::to_string(next_) +
                                 " has no such type");
      }
    };
    if constexpr (std::is_same_v<T, const View*>) {
      if (argument.tag == Tag::kNone) return nullptr;
      require(Tag::kView);
      return &argument.view;
    } else if constexpr (std::is_same_v<T, const View&>) {
      require(Tag::kView);
      return argument.view;
    } else if constexpr (std::is_same_v<T, std::string>) {
      require(Tag::kText);
      return argument.text;
    } else if constexpr (std::is_floating_point_v<T>) {
      require(Tag::kReal);
      return static_cast<T>(argument.real);
    } else {
      static_assert(std::is_integral_v<T>);
      require(Tag::kInteger);
      return static_cast<T>(argument.integer);
    }
  }

  void finish() const {
    if (next_ != arguments_.size()) throw std::runtime_error(name_ + ": too many arguments");
  }

 private:
  enum class Tag : int64_t { kNone, kInteger, kReal, kText, kView };
  struct Argument {
    Tag tag;
    View view;
    int64_t integer;
    double real;
    std::string text;
  };

  View read_view() {
    View view{};
    const int64_t array = read_integer(), offset = read_integer();
    view.data = arrays_.at(array).data() + offset;
    view.dtype = static_cast<DType>(read_integer());
    view.ndim = static_cast<int>(read_integer());
    for (int i = 0; i < view.ndim; ++i) view.size[i] = read_integer();
    for (int i = 0; i < view.ndim; ++i) view.stride[i] = read_integer();
    return view;
  }

  std::string name_;
  std::deque<Array> arrays_;
  std::deque<Argument> arguments_;
  size_t next_ = 0;
};

template <class... Arguments>
void call(void (*function)(Arguments...), Request& request) {
  // Braces take the arguments in order, which a call need not do.
  const std::tuple<Arguments...> arguments{request.take<Arguments>()...};
  request.finish();
  std::apply(function, arguments);
}

void run(Request& request) {
  using Operator = void (*)(Request&);
  static const std::map<std::string, Operator> operators{
      {"patch_embed", [](Request& r) { call(calls::patch_embed, r); }},
      {"norm_linear", [](Request& r) { call(calls::norm_linear, r); }},
      {"attention", [](Request& r) { call(calls::attention, r); }},
      {"rotate", [](Request& r) { call(calls::rotate, r); }},
      {"linear_residual", [](Request& r) { call(calls::linear_residual, r); }},
      {"self_attention", [](Request& r) { call(calls::self_attention, r); }},
      {"mlp", [](Request& r) { call(calls::mlp, r); }},
      {"pool", [](Request& r) { call(calls::pool, r); }},
      {"quantize_rows", [](Request& r) { call(calls::quantize_rows, r); }},
      {"pack_weight", [](Request& r) { call(calls::pack_weight, r); }},
  };
  if (request.name() == "isa") return answer(0, cpu::isa());
  if (request.name() == "supported_isas") {
    std::string names;
    for (const std::string& name : cpu::supported_isas()) names += name + " ";
    return answer(0, names);
  }
  if (request.name() == "set_isa") {
    cpu::set_isa(request.take<std::string>());
    return answer(0, "");
  }
  if (request.name() == "packed_bytes") {
    const auto n = request.take<int64_t>(), k = request.take<int64_t>();
    return answer(0, std::to_string(cpu::kernels().packed_bytes(n, k)));
  }
  operators.at(request.name())(request);
  int64_t bytes = 0;
  for (const Array& array : request.arrays()) bytes += array.bytes();
  write_integer(0);
  write_integer(bytes);
  for (const Array& array : request.arrays()) std::fwrite(array.data(), 1, array.bytes(), stdout);
}

}  // namespace
}  // namespace fastvit

int main() {
  for (int next = std::getc(stdin); next != EOF; next = std::getc(stdin)) {
    std::ungetc(next, stdin);
    fastvit::Request request;
    try {
      fastvit::run(request);
    } catch (const std::exception& error) {
      fastvit::answer(1, error.what());
    }
    std::fflush(stdout);
  }
}
