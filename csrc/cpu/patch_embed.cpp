// fastvit: per-isa
//
// patch_embed: tokens[b, r] = prefix[r]; tokens[b, R + p] = patch(b, p) @ weight^T + bias + pos[p]
//
// A patch is a row of A of C * P1 * P2 elements in the order (c, ky, kx) of a Conv2d weight. The
// source functor gathers it straight from the image, whatever its strides and dtype, and applies
// the per-channel scale and shift that normalise an image. Position and bias are the epilogue.
//
// Folding scale and shift into the weights would save one instruction in kLanes pixels, nothing
// beside the D products of each. It would cost a scaled copy of the weights per call, and in bf16
// twice the error unless the shift is summed from the rounded copy.
//
// Bytes times an int8 weight, into which the caller has folded both, are a product of integers:
// the patch is exact, and only the weight was rounded.

#include "epilogues.h"
#include "pixels.h"
#include "product.h"
#include "rows.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

// kSize bytes from either end, where they overlap, with the bits of `flip` turned over.
template <int kSize, uint8_t flip>
FASTVIT_INLINE void copy_ends(void* to, const void* from, int64_t bytes) {
  typedef uint8_t Some __attribute__((vector_size(kSize)));
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
  Some begin, end;
  __builtin_memcpy(&begin, in, kSize);
  __builtin_memcpy(&end, in + bytes - kSize, kSize);
  begin ^= flip;
  end ^= flip;
  __builtin_memcpy(out, &begin, kSize);
  __builtin_memcpy(out + bytes - kSize, &end, kSize);
}

template <uint8_t flip>
FASTVIT_INLINE void copy_bytes(void* to, const void* from, int64_t bytes) {
  auto* out = static_cast<uint8_t*>(to);
  const auto* in = static_cast<const uint8_t*>(from);
  for (; bytes > 32; bytes -= 16, out += 16, in += 16) copy_ends<16, flip>(out, in, 16);
  if (bytes >= 16) return copy_ends<16, flip>(out, in, bytes);
  if (bytes >= 8) return copy_ends<8, flip>(out, in, bytes);
  for (int64_t i = 0; i < bytes; ++i) out[i] = in[i] ^ flip;
}

// How pixels of channel c become `n` elements of a row of A.
struct Normalized {
  static constexpr bool kBytes = false;  // is there a `put` of bytes as they are?

  const float* scale;
  const float* shift;

  template <class Element>
  FASTVIT_INLINE_METHOD void put(f32v pixels, int64_t c, Element* to, int64_t n) const {
    const f32v v = fmadd(pixels, set1(scale[c]), set1(shift[c]));
    n == kLanes ? store(to, v) : store(to, v, n);
  }
};

// Bytes less 128, or shifted up again where the product wants them unsigned.
template <class P>
struct CentredBytes {
  static constexpr bool kBytes = sizeof(typename P::Element) == 1;

  FASTVIT_INLINE_METHOD void put(f32v pixels, int64_t, typename P::Element* to, int64_t n) const {
    const i32v v = to_int(pixels) - 128;
    if (n == kLanes) return P::store_row(to, v);
    typename P::Element some[kLanes];
    P::store_row(some, v);
    copy_bytes<0>(to, some, n * static_cast<int64_t>(sizeof(typename P::Element)));
  }

  FASTVIT_INLINE_METHOD void put(const uint8_t* pixels, typename P::Element* to, int64_t n) const {
    copy_bytes<P::kHasSums ? 0 : 128>(to, pixels, n);
  }
};

template <class Values>
struct Patches {
  const View& image;
  int64_t p1, p2;         // patch height and width
  int64_t across, count;  // patches per row of the image, and per image
  Values values;

  // Returns the scale of the row, which a product of integers asks for.
  template <class Element>
  float operator()(int64_t row, Element* out) const {
    switch (image.dtype) {
      case DType::kF32:
        gather(corners<float>(row), out);
        break;
      case DType::kBF16:
        gather(corners<bf16>(row), out);
        break;
      default:
        const Corners<uint8_t> pixels = corners<uint8_t>(row);
        if (is_interleaved(3)) {
          separate<3>(pixels, out);
        } else if (is_interleaved(4)) {
          separate<4>(pixels, out);
        } else {
          gather(pixels, out);
        }
    }
    return 1.0f;
  }

  // Where a patch begins, and one that comes soon. A patch is a few bytes of each of many lines:
  // no hardware prefetcher foresees it.
  template <class T>
  struct Corners {
    const T *now, *soon;

    void prefetch(int64_t offset) const { __builtin_prefetch(soon + offset, 0, 3); }
  };

  template <class T>
  Corners<T> corners(int64_t row) const {
    constexpr int64_t kAhead = 4;  // lines of 16 bytes: then of the next 64
    return {corner<T>(row), corner<T>(min(row + kAhead, image.size[0] * count - 1))};
  }

  template <class T>
  const T* corner(int64_t row) const {
    const int64_t patch = row % count;
    return static_cast<const T*>(image.data) + row / count * image.stride[0] +
           patch / across * p1 * image.stride[2] + patch % across * p2 * image.stride[3];
  }

  // All channels lie side by side, `step` apart from pixel to pixel.
  bool is_interleaved(int64_t step) const {
    return image.stride[3] == step && image.stride[1] == 1 && image.size[1] <= step;
  }

  // Any strides: channel by channel, line by line.
  template <class T, class Element>
  void gather(const Corners<T>& corner, Element* out) const {
    for (int64_t c = 0; c < image.size[1]; ++c) {
      for (int64_t y = 0; y < p1; ++y, out += p2) {
        const int64_t offset = c * image.stride[1] + y * image.stride[2];
        corner.prefetch(offset);
        copy_line(corner.now + offset, image.stride[3], c, out);
      }
    }
  }

  template <class T, class Element>
  void copy_line(const T* line, int64_t step, int64_t c, Element* out) const {
    if constexpr (Values::kBytes && sizeof(T) == 1) {
      if (step == 1) return values.put(line, out, p2);
    }
    for (int64_t x = 0; x < p2; x += kLanes) {
      const int64_t n = min(kLanes, p2 - x);
      f32v pixels;
      if (step == 1) {
        pixels = n == kLanes ? load(line + x) : load(line + x, n);
      } else {
        float gathered[kLanes] = {};
        for (int64_t i = 0; i < n; ++i) gathered[i] = to_f32(line[(x + i) * step]);
        pixels = load(gathered);
      }
      values.put(pixels, c, out + x, n);
    }
  }

  // Interleaved bytes: each is read once and goes to its channel's place.
  template <int kStep, class Element>
  void separate(const Corners<uint8_t>& corner, Element* out) const {
    const int64_t channels = image.size[1], gap = kStep - channels;  // bytes that aren't ours
    for (int64_t y = 0; y < p1; ++y, out += p2) {
      const uint8_t* line = corner.now + y * image.stride[2];
      corner.prefetch(y * image.stride[2]);
      for (int64_t x = 0; x < p2; x += kLanes) {
        const int64_t n = min(kLanes, p2 - x);
        const Pixels pixels = load_pixels<kStep>(line + x * kStep, n * kStep - gap);
        // What a whole vector leaves behind a line is written over with the channel's next ones.
        const int64_t wide = (p1 - y) * p2 - x < kLanes ? n : kLanes;
#pragma GCC unroll 4
        for (int c = 0; c < kStep; ++c) {
          if (c == channels) break;
          values.put(channel_of(pixels, c), c, out + c * p1 * p2 + x, wide);
        }
      }
    }
  }
};

struct AddPosition {
  Rows out;  // ld: between tokens
  int64_t sample_stride, prefix, count;
  const float* bias;
  const View* pos_embed;

  int64_t offset(int64_t sample, int64_t patch) const {
    return sample * sample_stride + (prefix + patch) * out.ld;
  }

  void prefetch(int64_t row, int64_t col, Tiles& tiles) const {
    const int64_t patch = row % count;
    tiles[0] = out.tile(offset(row / count, patch) + col, kPanel);
    if (pos_embed) {
      const int64_t ld = pos_embed->stride[0];
      tiles[1] = Rows(*pos_embed, ld).tile(patch * ld + col, kPanel);
    }
  }

  void operator()(const float* tile, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const bool done =
        pos_embed && pos_embed->dtype == out.dtype && if_whole(cols, [&](auto vectors) {
          if (out.dtype == DType::kF32) {
            whole<vectors, float>(tile, row, rows, col);
          } else {
            whole<vectors, bf16>(tile, row, rows, col);
          }
        });
    if (done) return;
    int64_t sample = row / count, patch = row % count;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t to = offset(sample, patch) + col;
      for (int64_t j = 0; j < cols; j += kLanes) {
        f32v y = load(tile + i * kPanel + j) + load(bias + col + j);
        if (pos_embed) {
          y += Rows(*pos_embed, 0).load_at(patch * pos_embed->stride[0] + col + j, cols - j);
        }
        out.store_at(to + j, y, cols - j);
      }
      if (++patch == count) patch = 0, ++sample;
    }
  }

  // As `Activate::whole`.
  template <int kCount, class T>
  void whole(const float* tile, int64_t row, int64_t rows, int64_t col) const {
    f32v b[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) b[j] = load(bias + col + j * kLanes);
    int64_t sample = row / count, patch = row % count;
    for (int64_t i = 0; i < rows; ++i, tile += kPanel) {
      const T* position =
          static_cast<const T*>(pos_embed->data) + patch * pos_embed->stride[0] + col;
      T* to = static_cast<T*>(out.data) + offset(sample, patch) + col;
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        const f32v y = load(tile + j * kLanes) + b[j];
        store(to + j * kLanes, y + load(position + j * kLanes));
      }
      if (++patch == count) patch = 0, ++sample;
    }
  }
};

void write_prefix(const PatchEmbedArgs& args) {
  const Rows out(args.out, 0), prefix(*args.prefix, 0);
  const int64_t dim = args.out.size[2];
  for (int64_t b = 0; b < args.out.size[0]; ++b) {
    for (int64_t r = 0; r < args.prefix->size[0]; ++r) {
      const int64_t to = b * args.out.stride[0] + r * args.out.stride[1];
      for (int64_t j = 0; j < dim; j += kLanes) {
        const f32v v = prefix.load_at(r * args.prefix->stride[0] + j, dim - j);
        out.store_at(to + j, v, dim - j);
      }
    }
  }
}

template <class P, class Values>
void embed(const PatchEmbedArgs& args, const Values& values, const float* weight_scale,
           const float* bias) {
  const int64_t batch = args.image.size[0], channels = args.image.size[1];
  const int64_t p1 = args.weight.size[2], p2 = args.weight.size[3];
  const int64_t across = args.image.size[3] / p2, count = args.image.size[2] / p1 * across;
  const int64_t n = args.weight.size[0], k = channels * p1 * p2;
  const Patches<Values> source{args.image, p1, p2, across, count, values};
  const AddPosition epilogue{Rows(args.out, args.out.stride[1]),
                             args.out.stride[0],
                             args.prefix ? args.prefix->size[0] : 0,
                             count,
                             bias,
                             args.pos_embed};
  const void* packed = args.weight_packed ? args.weight_packed->data : nullptr;
  const Weight weight{args.weight.data, args.weight.dtype, k, n, k, false, weight_scale, packed};
  product<P>(batch * count, weight, args.num_threads, source, epilogue);
}

template <class P>
void run(const PatchEmbedArgs& args) {
  if (args.prefix) write_prefix(args);
  const int64_t n = args.weight.size[0], channels = args.image.size[1];
  Vectors vectors(3, max(n, channels));
  const float* bias = vectors.take(args.bias, 0, n, 0.0f);
  if (args.weight.dtype == DType::kI8) {
    const float* weight_scale = vectors.take_scale(args.weight_scale, n);
    float* shift = vectors.take(args.weight_shift, 0, n, 0.0f);
    for (int64_t i = 0; i < n; i += kLanes) store(shift + i, load(shift + i) + load(bias + i));
    return embed<ProductI8>(args, CentredBytes<ProductI8>{}, weight_scale, shift);
  }
  const float* scale = vectors.take(args.channel_scale, 0, channels, 1.0f);
  const float* shift = vectors.take(args.channel_shift, 0, channels, 0.0f);
  embed<P>(args, Normalized{scale, shift}, nullptr, bias);
}

}  // namespace

void patch_embed(const PatchEmbedArgs& args) {
  args.compute == Compute::kBF16 ? run<ProductBF16>(args) : run<ProductF32>(args);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
