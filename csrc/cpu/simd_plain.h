// The vector abstraction in what GCC's vector extension can say: simd.h includes it.

#pragma once

namespace fastvit::cpu::FASTVIT_ISA {

constexpr int kLanes = 4;
constexpr int kVectors = 2;
typedef float f32v __attribute__((vector_size(16), may_alias));
typedef int32_t i32v __attribute__((vector_size(16), may_alias));

FASTVIT_INLINE f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTVIT_INLINE void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }
FASTVIT_INLINE f32v set1(float x) { return f32v{x, x, x, x}; }
FASTVIT_INLINE f32v fmadd(f32v a, f32v b, f32v c) { return a * b + c; }
FASTVIT_INLINE f32v fmadd_in_place(f32v a, f32v b, f32v c) { return fmadd(a, b, c); }
FASTVIT_INLINE f32v at_least(f32v v, f32v low) { return v < low ? low : v; }
FASTVIT_INLINE f32v at_most(f32v v, f32v high) { return v > high ? high : v; }
FASTVIT_INLINE i32v to_int(f32v v) { return __builtin_convertvector(v, i32v); }
FASTVIT_INLINE f32v to_float(i32v v) { return __builtin_convertvector(v, f32v); }
FASTVIT_INLINE f32v swap_pairs(f32v v) { return f32v{v[1], v[0], v[3], v[2]}; }
FASTVIT_INLINE f32v hadamard_lanes(f32v v) {
  v = f32v{v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
  return f32v{v[0] + v[2], v[1] + v[3], v[0] - v[2], v[1] - v[3]};
}
FASTVIT_INLINE f32v load(const bf16* p) {
  return f32v{to_f32(p[0]), to_f32(p[1]), to_f32(p[2]), to_f32(p[3])};
}
FASTVIT_INLINE f32v load(const uint8_t* p) {
  return f32v{to_f32(p[0]), to_f32(p[1]), to_f32(p[2]), to_f32(p[3])};
}

// r[i] holds row i; afterwards r[j] holds column j.
FASTVIT_INLINE void transpose(f32v (&r)[kLanes]) {
  const f32v a = r[0], b = r[1], c = r[2], d = r[3];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) r[j] = f32v{a[j], b[j], c[j], d[j]};
}

FASTVIT_INLINE f32v zero() { return set1(0.0f); }
FASTVIT_INLINE f32v abs(f32v v) { return (f32v)((i32v)v & 0x7fffffff); }

// Tails go through a buffer: they are rare.
template <class T>
FASTVIT_INLINE f32v load(const T* p, int64_t n) {
  float buffer[kLanes] = {};
  for (int i = 0; i < n && i < kLanes; ++i) buffer[i] = to_f32(p[i]);
  return load(buffer);
}
FASTVIT_INLINE void store(float* p, f32v v, int64_t n) {
  float buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n && i < kLanes; ++i) p[i] = buffer[i];
}
FASTVIT_INLINE void store(bf16* p, f32v v, int64_t n) {
  float buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n && i < kLanes; ++i) p[i] = to_bf16(buffer[i]);
}
FASTVIT_INLINE void store(bf16* p, f32v v) { store(p, v, kLanes); }
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n, f32v others) {
  float buffer[kLanes];
  store(buffer, others);
  store(buffer, v, n);
  return load(buffer);
}
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n) { return keep_first(v, n, zero()); }

FASTVIT_INLINE void store_bytes(void* p, i32v v) {
  for (int i = 0; i < kLanes; ++i) static_cast<int8_t*>(p)[i] = static_cast<int8_t>(v[i]);
}
FASTVIT_INLINE void store_words(void* p, i32v v) {
  for (int i = 0; i < kLanes; ++i) static_cast<int16_t*>(p)[i] = static_cast<int16_t>(v[i]);
}

// Adding 1.5 * 2^23 leaves no bits for a fraction; right for |v| < 2^22.
FASTVIT_INLINE f32v nearest(f32v v) {
  const f32v magic = set1(12582912.0f);
  return (v + magic) - magic;
}

FASTVIT_INLINE float reduce_add(f32v v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
FASTVIT_INLINE float reduce_max(f32v v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

}  // namespace fastvit::cpu::FASTVIT_ISA
