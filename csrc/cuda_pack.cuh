// Eight neighbouring numbers of a row: what a thread loads, computes with in fp32, and stores.
//
// The type is a value, not a template argument: one kernel serves every mix of types. A branch on it
// takes the same side in every thread, and the loads are as wide either way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rows.h"

namespace tdm::cuda {

constexpr int kPack = 8;
constexpr int kWarp = 32;

// The bits as they lie in memory; half precision fills the first four words. Loading and widening
// are two steps, so that the loads of several tensors are under way together.
struct Pack {
  uint32_t word[kPack];
};

__device__ inline char* at(void* data, Type type, int64_t i) {
  return static_cast<char*>(data) + i * (type == Type::f32 ? 4 : 2);
}

// The numbers i to i + 7, or to i + count - 1: nothing past them is read, and they count as zero.
template <bool kAligned>
__device__ inline Pack load(void* data, Type type, int64_t i, int count) {
  Pack pack{};
  if (count <= 0) return pack;
  const char* from = at(data, type, i);
  if constexpr (kAligned) {
    const uint4* words = reinterpret_cast<const uint4*>(from);
    const uint4 low = __ldg(words);
    pack.word[0] = low.x, pack.word[1] = low.y, pack.word[2] = low.z, pack.word[3] = low.w;
    if (type == Type::f32) {
      const uint4 high = __ldg(words + 1);
      pack.word[4] = high.x, pack.word[5] = high.y, pack.word[6] = high.z, pack.word[7] = high.w;
    }
  } else {
    // Past the end the first number is read again: eight branches would cost spilled registers.
#pragma unroll
    for (int j = 0; j < kPack; j++) {
      const int from_j = j < count ? j : 0;
      if (type == Type::f32) {
        const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(from) + from_j);
        pack.word[j] = j < count ? bits : 0;
      } else {
        const uint32_t bits = __ldg(reinterpret_cast<const uint16_t*>(from) + from_j);
        pack.word[j / 2] |= (j < count ? bits : 0) << (j % 2 * 16);
      }
    }
  }
  return pack;
}

template <bool kAligned>
__device__ inline void store(const Pack& pack, void* data, Type type, int64_t i, int count) {
  char* to = at(data, type, i);
  const uint32_t* w = pack.word;
  if constexpr (kAligned) {
    if (count > 0) {
      uint4* words = reinterpret_cast<uint4*>(to);
      words[0] = make_uint4(w[0], w[1], w[2], w[3]);
      if (type == Type::f32) words[1] = make_uint4(w[4], w[5], w[6], w[7]);
    }
  } else if (type == Type::f32) {
#pragma unroll
    for (int j = 0; j < kPack; j++)
      if (j < count) reinterpret_cast<uint32_t*>(to)[j] = w[j];
  } else {
#pragma unroll
    for (int j = 0; j < kPack; j++)
      if (j < count) reinterpret_cast<uint16_t*>(to)[j] = uint16_t(w[j / 2] >> (j % 2 * 16));
  }
}

__device__ inline void widen(float (&out)[kPack], const Pack& pack, Type type) {
  if (type == Type::f32) {
#pragma unroll
    for (int j = 0; j < kPack; j++) out[j] = __uint_as_float(pack.word[j]);
  } else if (type == Type::bf16) {
#pragma unroll
    for (int j = 0; j < kPack; j++)
      out[j] = __uint_as_float(j % 2 ? pack.word[j / 2] & 0xffff0000u : pack.word[j / 2] << 16);
  } else {
#pragma unroll
    for (int j = 0; j < kPack; j++)
      out[j] = __half2float(__ushort_as_half(uint16_t(pack.word[j / 2] >> (j % 2 * 16))));
  }
}

__device__ inline Pack narrow(const float (&in)[kPack], Type type) {
  Pack pack{};
  if (type == Type::f32) {
#pragma unroll
    for (int j = 0; j < kPack; j++) pack.word[j] = __float_as_uint(in[j]);
  } else if (type == Type::bf16) {
#pragma unroll
    for (int j = 0; j < kPack; j += 2)
      pack.word[j / 2] = uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(in[j + 1]))) << 16 |
                         __bfloat16_as_ushort(__float2bfloat16_rn(in[j]));
  } else {
#pragma unroll
    for (int j = 0; j < kPack; j += 2)
      pack.word[j / 2] = uint32_t(__half_as_ushort(__float2half_rn(in[j + 1]))) << 16 |
                         __half_as_ushort(__float2half_rn(in[j]));
  }
  return pack;
}

__device__ inline float sum_squares(const float (&a)[kPack]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPack; j++) sum += a[j] * a[j];
  return sum;
}

// The sum over the `lanes` neighbouring threads (a power of two) that each thread is one of.
__device__ inline float sum_over(float v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

}  // namespace tdm::cuda
