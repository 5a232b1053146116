// head_norms: a block per token of q or k; a head is held by neighbouring threads of one warp.
#include <algorithm>

#include <cuda_runtime.h>

#include "cuda.h"
#include "cuda_pack.cuh"

namespace tdm::cuda {
namespace {

constexpr int kMaxThreads = 256;

__device__ inline void turn(float (&x)[kPack], const float (&rope)[kPack]) {
#pragma unroll
  for (int j = 0; j < kPack; j += 2) {
    const float a = x[j], b = x[j + 1];
    x[j] = a * rope[j] - b * rope[j + 1];
    x[j + 1] = a * rope[j + 1] + b * rope[j];
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    head_norm(const __grid_constant__ HeadNorm p, int log2_lanes) {
  const Heads& side = p.side[blockIdx.z];
  const int64_t t = blockIdx.x, b = blockIdx.y;
  const int lanes = 1 << log2_lanes, thread = threadIdx.x, stride = blockDim.x >> log2_lanes;
  const int h = (thread & (lanes - 1)) * kPack, width = int(p.H) - h;
  // What all heads of the token share is read once.
  float rope[kPack], weight[kPack], x[kPack];
  if (p.rope.data) {
    const int64_t from = b * p.rope.batch + t * p.rope.row + h;
    widen(rope, load<kAligned>(p.rope.data, Type::f32, from, width), Type::f32);
  }
  if (side.weight.data) {
    const Type type = side.weight.type;
    widen(weight, load<kAligned>(side.weight.data, type, h, width), type);
  }
  // The bound is the same for all threads: each takes part in its warp's sums to the end.
  for (int first = 0; first < side.N; first += stride) {
    const int n = first + (thread >> log2_lanes), count = n < side.N ? width : 0;
    const int64_t from = b * side.x.batch + t * side.x.row + n * side.x_head + h;
    widen(x, load<kAligned>(side.x.data, side.x.type, from, count), side.x.type);
    if (side.weight.data) {
      const float rstd = rsqrtf(sum_over(sum_squares(x), lanes) * p.share + p.eps);
#pragma unroll
      for (int j = 0; j < kPack; j++) x[j] *= rstd * weight[j];
    }
    if (p.rope.data) turn(x, rope);
    const int64_t to = b * side.out.batch + t * side.out.row + n * side.out_head + h;
    store<kAligned>(narrow(x, side.out.type), side.out.data, side.out.type, to, count);
  }
}

}  // namespace

const char* launch(const HeadNorm& p, void* stream) {
  int64_t heads = 0;
  for (int i = 0; i < p.sides; i++) heads = std::max(heads, p.side[i].N);
  if (!p.B || !p.T || !p.H || !heads) return nullptr;
  int log2_lanes = 0;
  while (kPack << log2_lanes < p.H) log2_lanes++;
  const int64_t warps = ((heads << log2_lanes) + kWarp - 1) / kWarp;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(p.T), unsigned(p.B), p.sides);
  config.blockDim = dim3(unsigned(std::min<int64_t>(warps * kWarp, kMaxThreads)));
  config.stream = static_cast<cudaStream_t>(stream);
  const auto kernel = p.aligned ? head_norm<true> : head_norm<false>;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p, log2_lanes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tdm::cuda
