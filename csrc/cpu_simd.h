// What the CPU kernels are written in. Compiled once per instruction set: TDM_ISA names the
// namespace, TDM_LANES the floats of a register. All arithmetic is fp32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu.h"

namespace tdm::TDM_ISA {

// The kernels of this instruction set; `cpu.h` says what each computes.
void residual_norm(const ResidualNorm&, int64_t row0, int64_t row1);
void residual_norm_backward(const ResidualNorm&, int64_t b0, int64_t b1);
void head_norm(const HeadNorm&, int64_t row0, int64_t row1);
void head_norm_backward(const HeadNorm&, int64_t b0, int64_t b1);
void gelu(const Elementwise&, int64_t i0, int64_t i1);
void gelu_backward(const Elementwise&, int64_t i0, int64_t i1);
void swiglu(const SwiGLU&, int64_t row0, int64_t row1);
void swiglu_backward(const Elementwise&, int64_t i0, int64_t i1);
void attention(const Attention&, int64_t head0, int64_t head1);
void attention_backward(const Attention&, int64_t head0, int64_t head1);
void linear(const Linear&, int64_t item0, int64_t item1);
void group_affine(const GroupAffine&, int64_t b0, int64_t b1);
void conv(const Conv&, int64_t row0, int64_t row1);

using bf16 = uint16_t;

inline float load(float v) { return v; }
inline float load(bf16 v) {
  uint32_t bits = uint32_t(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <class T>
inline T store(float v);
template <>
inline float store<float>(float v) {
  return v;
}
template <>
inline bf16 store<bf16>(float v) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return bf16(v != v ? 0x7fc0 : rounded);
}

// e^x within 2 ulp (Cephes' polynomial), infinite from 88.4 on; NaN passes through.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + magic;
  int32_t n;
  std::memcpy(&n, &shifted, 4);
  const float whole = shifted - magic;
  float r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = int32_t(uint32_t(n - 0x4b400000 + 127) << 23);
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// 2 u of GELU's tanh argument u = sqrt(2 / pi) (x + 0.044715 x^3): 0.5 (1 + tanh u) = sigmoid(2 u).
constexpr float kLinear = 1.5957691216f, kCubic = 0.044715f * 1.5957691216f;

inline float gelu_one(float x) { return x * sigmoid(x * (kLinear + kCubic * x * x)); }

// A register's worth of floats; unaligned in memory.
using Vec = float __attribute__((vector_size(TDM_LANES * 4)));
constexpr int kLanes = TDM_LANES;

template <class V>
inline V get(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void put(float* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Calls f(V(), d) for d = 0 .. n - 1: V is Vec for a register's worth from d, float for the rest.
template <class F>
inline void each(int64_t n, F f) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) f(Vec(), d);
  for (; d < n; d++) f(float(), d);
}

// The sum of a register, halves upon halves: a chain of additions would be waited for.
inline float across(Vec v) {
  float part[kLanes];
  put(part, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) part[i] += part[i + n];
  return part[0];
}

// The sum of what f returns, in four chains that do not wait for one another.
template <class F>
inline float sum_of(int64_t n, F f) {
  Vec sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes <= n; d += 4 * kLanes)
    for (int i = 0; i < 4; i++) sum[i] += f(Vec(), d + i * kLanes);
  for (; d + kLanes <= n; d += kLanes) sum[0] += f(Vec(), d);
  float all = across((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; d < n; d++) all += f(float(), d);
  return all;
}

inline float dot(const float* a, const float* b, int64_t n) {
  return sum_of(n, [&](auto v, int64_t d) {
    using V = decltype(v);
    return get<V>(a + d) * get<V>(b + d);
  });
}

inline float total(const float* a, int64_t n) {
  return sum_of(n, [&](auto v, int64_t d) { return get<decltype(v)>(a + d); });
}

// The largest of `n` numbers, a multiple of kLanes and above 0.
inline float largest(const float* a, int64_t n) {
  Vec top = get<Vec>(a);
  for (int64_t d = kLanes; d < n; d += kLanes) {
    const Vec v = get<Vec>(a + d);
    top = v > top ? v : top;
  }
  float all = top[0];
  for (int i = 1; i < kLanes; i++) all = top[i] > all ? top[i] : all;
  return all;
}

template <class T>
inline T* at(const Rows& rows, int64_t b, int64_t t) {
  return static_cast<T*>(rows.data) + b * rows.batch + t * rows.row;
}

inline float* at(const Vectors& v, int64_t m, int64_t b) {
  return static_cast<float*>(v.data) + m * v.set + b * v.batch;
}

template <class T>
inline void widen(float* __restrict out, const T* __restrict in, int64_t n) {
  for (int64_t d = 0; d < n; d++) out[d] = load(in[d]);
}

template <class T>
inline void narrow(T* __restrict out, const float* __restrict in, int64_t n) {
  for (int64_t d = 0; d < n; d++) out[d] = store<T>(in[d]);
}

inline void read(float* out, const Rows& rows, int64_t b, int64_t t, int64_t n) {
  if (rows.type == Type::bf16)
    widen(out, at<const bf16>(rows, b, t), n);
  else
    widen(out, at<const float>(rows, b, t), n);
}

inline void write(const Rows& rows, int64_t b, int64_t t, const float* in, int64_t n) {
  if (rows.type == Type::bf16)
    narrow(at<bf16>(rows, b, t), in, n);
  else
    narrow(at<float>(rows, b, t), in, n);
}

// A row of floats to read: in place, or widened into `scratch`.
inline const float* floats(const Rows& rows, int64_t b, int64_t t, int64_t n, float* scratch) {
  if (rows.type == Type::f32) return at<const float>(rows, b, t);
  read(scratch, rows, b, t, n);
  return scratch;
}

// A row to write floats into: in place, or `scratch`, which `finish` then narrows.
inline float* target(const Rows& rows, int64_t b, int64_t t, float* scratch) {
  return rows.type == Type::f32 ? at<float>(rows, b, t) : scratch;
}

inline void finish(const Rows& rows, int64_t b, int64_t t, const float* scratch, int64_t n) {
  if (rows.type != Type::f32) write(rows, b, t, scratch, n);
}

// Buffers of one thread: rows of D floats.
struct Scratch {
  explicit Scratch(int64_t width, int count) : width(width), data(width * count) {}
  float* row(int i) { return data.data() + i * width; }
  int64_t width;
  std::vector<float> data;
};

// c [R, NV * kLanes] = a [R, depth] b [depth, NV * kLanes] + start, all in registers; `start` is
// null, one row for all (start_row 0), or c itself. a_step: from one number of a row of a to the next.
template <int R, int NV>
inline void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                 const float* start, int64_t start_row, float* c, int64_t c_row, int64_t a_step = 1) {
  Vec sum[R][NV] = {};
  for (int64_t d = 0; d < depth; d++) {
    Vec right[NV];
#pragma GCC unroll 16
    for (int i = 0; i < NV; i++) right[i] = get<Vec>(b + d * b_row + i * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float left = a[r * a_row + d * a_step];
#pragma GCC unroll 16
      for (int i = 0; i < NV; i++) sum[r][i] += left * right[i];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < NV; i++) {
      const Vec v = start ? sum[r][i] + get<Vec>(start + r * start_row + i * kLanes) : sum[r][i];
      put(c + r * c_row + i * kLanes, v);
    }
  }
}

}  // namespace tdm::TDM_ISA
