// What every kernel reads and writes: raw rows, no tensors.
#pragma once

#include <cstdint>

namespace tdm {

enum class Type : int { f32, bf16, f16 };  // f16: the CUDA kernels only

// [B, T, D] with unit stride along D; strides in elements. `data` null: the tensor is absent.
struct Rows {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch = 0;
  int64_t row = 0;
};

// The same rows from an element further on. Static: every instruction set has its own copy.
static inline Rows offset(Rows rows, int64_t elements) {
  rows.data = static_cast<char*>(rows.data) + elements * (rows.type == Type::f32 ? 4 : 2);
  return rows;
}

// [M, B or 1, 1, D] with unit stride along D; strides in elements, 0 where shared. fp32 on a CPU.
struct Vectors {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t set = 0;
  int64_t batch = 0;
};

}  // namespace tdm
