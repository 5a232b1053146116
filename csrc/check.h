// From tensors to the plain structs of cpu.h; every layout the kernels cannot take is refused here.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu.h"

namespace tdm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline Type type_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  " must be float32 or bfloat16");
  return type == ScalarType::Float ? Type::f32 : Type::bf16;
}

// A [B, T, D] tensor with unit stride along D.
inline Rows rows_of(const Tensor& x, const char* name, int64_t B, int64_t T, int64_t D) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == B && x.size(1) == T && x.size(2) == D, name,
                  " must be [", B, ", ", T, ", ", D, "]");
  STD_TORCH_CHECK(x.stride(2) == 1 || D == 1, name, " must have unit stride along its last axis");
  return {x.data_ptr(), type_of(x, name), x.stride(0), x.stride(1)};
}

inline Rows rows_of(const Optional& x, const char* name, int64_t B, int64_t T, int64_t D) {
  return x ? rows_of(*x, name, B, T, D) : Rows{};
}

// An [M, B or 1, 1, D] (or, M = 1, [B or 1, 1, D]) fp32 tensor with unit stride along D.
inline Vectors vectors_of(const Optional& x, const char* name, int64_t M, int64_t B, int64_t D) {
  if (!x) return {};
  const int64_t last = x->dim() - 1;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(last == 2 || last == 3, name, " must have 3 or 4 axes");
  STD_TORCH_CHECK((last == 3 ? x->size(0) : 1) == M && x->size(last) == D &&
                      x->size(last - 1) == 1 &&
                      (x->size(last - 2) == B || x->size(last - 2) == 1),
                  name, " must be [", M, ", ", B, " or 1, 1, ", D, "]");
  STD_TORCH_CHECK(x->stride(last) == 1 || D == 1, name, " must have unit stride along its last axis");
  return {static_cast<float*>(x->data_ptr()), last == 3 ? x->stride(0) : 0,
          x->size(last - 2) == 1 ? 0 : x->stride(last - 2)};
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
