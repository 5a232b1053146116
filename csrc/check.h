// From tensors to the plain structs of rows.h; every layout the kernels cannot take is refused here.
// `kCuda` admits what the CUDA kernels alone read: float16, and modulation in any of the types.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "rows.h"

namespace tdm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <bool kCuda = false>
Type type_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  if (kCuda && type == ScalarType::Half) return Type::f16;
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  kCuda ? " must be float32, bfloat16 or float16" : " must be float32 or bfloat16");
  return type == ScalarType::Float ? Type::f32 : Type::bf16;
}

// A [B, T, D] tensor with unit stride along D.
template <bool kCuda = false>
Rows rows_of(const Tensor& x, const char* name, int64_t B, int64_t T, int64_t D) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == B && x.size(1) == T && x.size(2) == D, name,
                  " must be [", B, ", ", T, ", ", D, "]");
  STD_TORCH_CHECK(x.stride(2) == 1 || D == 1, name, " must have unit stride along its last axis");
  return {x.data_ptr(), type_of<kCuda>(x, name), x.stride(0), x.stride(1)};
}

template <bool kCuda = false>
Rows rows_of(const Optional& x, const char* name, int64_t B, int64_t T, int64_t D) {
  return x ? rows_of<kCuda>(*x, name, B, T, D) : Rows{};
}

// A [B, T, D] tensor, or [M, B, T, D] for M modulations of one norm: rows, and a stride over M.
template <bool kCuda = false>
Rows slabs_of(const Optional& y, const char* name, int64_t M, int64_t B, int64_t T, int64_t D,
              int64_t& set) {
  if (!y) return {};
  if (y->dim() == 3) return rows_of<kCuda>(*y, name, B, T, D);
  STD_TORCH_CHECK(y->dim() == 4 && y->size(0) == M && y->size(1) == B && y->size(2) == T &&
                      y->size(3) == D && (y->stride(3) == 1 || D == 1),
                  name, " must be [", M, ", ", B, ", ", T, ", ", D, "]");
  set = y->stride(0);
  return {y->data_ptr(), type_of<kCuda>(*y, name), y->stride(1), y->stride(2)};
}

// A [B, T, N, H] tensor with unit stride along H: rows over B and T, and a stride over heads.
template <bool kCuda = false>
Rows heads_of(const Tensor& x, const char* name, int64_t B, int64_t T, int64_t N, int64_t H,
              int64_t& stride) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == B && x.size(1) == T && x.size(2) == N &&
                      x.size(3) == H,
                  name, " must be [", B, ", ", T, ", ", N, ", ", H, "]");
  STD_TORCH_CHECK(x.stride(3) == 1 || H == 1, name, " must have unit stride along its last axis");
  stride = x.stride(2);
  return {x.data_ptr(), type_of<kCuda>(x, name), x.stride(0), x.stride(1)};
}

// An [M, B or 1, 1, D] (or, M = 1, [B or 1, 1, D]) tensor with unit stride along D.
template <bool kCuda = false>
Vectors vectors_of(const Optional& x, const char* name, int64_t M, int64_t B, int64_t D) {
  if (!x) return {};
  const int64_t last = x->dim() - 1;
  STD_TORCH_CHECK(kCuda || x->scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(last == 2 || last == 3, name, " must have 3 or 4 axes");
  STD_TORCH_CHECK((last == 3 ? x->size(0) : 1) == M && x->size(last) == D &&
                      x->size(last - 1) == 1 &&
                      (x->size(last - 2) == B || x->size(last - 2) == 1),
                  name, " must be [", M, ", ", B, " or 1, 1, ", D, "]");
  STD_TORCH_CHECK(x->stride(last) == 1 || D == 1, name, " must have unit stride along its last axis");
  return {x->data_ptr(), type_of<kCuda>(*x, name), last == 3 ? x->stride(0) : 0,
          x->size(last - 2) == 1 ? 0 : x->stride(last - 2)};
}

// The fp32 [B or 1, T, 1, H] table of (cos, sin) pairs.
inline Rows rope_of(const Optional& rope, int64_t B, int64_t T, int64_t H) {
  if (!rope) return {};
  STD_TORCH_CHECK(rope->dim() == 4 && (rope->size(0) == B || rope->size(0) == 1) &&
                      rope->size(1) == T && rope->size(2) == 1 && rope->size(3) == H &&
                      rope->stride(3) == 1 && H % 2 == 0 &&
                      rope->scalar_type() == ScalarType::Float,
                  "rope must be float32 [", B, " or 1, ", T, ", 1, ", H, "]");
  return {rope->data_ptr(), Type::f32, rope->size(0) == 1 ? 0 : rope->stride(0), rope->stride(1)};
}

// A contiguous tensor of `count` numbers, or null.
template <class T>
T* numbers_of(const Optional& x, const char* name, int64_t count, ScalarType type,
              const char* type_name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == type && x->is_contiguous() && x->numel() == count, name,
                  " must be ", count, " contiguous ", type_name, " numbers");
  return static_cast<T*>(x->data_ptr());
}

inline float* floats_of(const Optional& x, const char* name, int64_t count) {
  return numbers_of<float>(x, name, count, ScalarType::Float, "float32");
}

inline int64_t* counts_of(const Optional& x, const char* name, int64_t count) {
  return numbers_of<int64_t>(x, name, count, ScalarType::Long, "int64");
}

inline double* sums_of(const Optional& x, const char* name, int64_t count) {
  return numbers_of<double>(x, name, count, ScalarType::Double, "float64");
}

}  // namespace tdm
