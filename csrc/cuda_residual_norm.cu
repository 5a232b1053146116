// residual_norm: a block per row, which stays in registers from the first load to the last store.
#include <cuda_runtime.h>

#include "cuda.h"
#include "cuda_pack.cuh"

namespace tdm::cuda {
namespace {

constexpr int kMaxThreads = kMaxWidth / kPack;

// The sum over the block. `partial` serves one call: the next one needs its own.
__device__ float block_sum(float v, float (&partial)[kWarp]) {
  const int lane = threadIdx.x % kWarp;
  v = sum_over(v, kWarp);
  if (lane == 0) partial[threadIdx.x / kWarp] = v;
  __syncthreads();
  return sum_over(lane < int(blockDim.x) / kWarp ? partial[lane] : 0.0f, kWarp);
}

template <bool kAligned>
__device__ void read(float (&out)[kPack], const Vectors& v, int64_t m, int64_t b, int64_t d,
                     int count) {
  widen(out, load<kAligned>(v.data, v.type, m * v.set + b * v.batch + d, count), v.type);
}

// h += gate * branch', and branch' = branch or its RMSNorm.
template <bool kAligned>
__device__ void add_branch(float (&h)[kPack], float (&w)[kPack], const ResidualNorm& p, int64_t b,
                           int d, int count, float (&partial)[kWarp]) {
  float v[kPack];
  if (p.branch_weight.data) {
    const float rstd = rsqrtf(block_sum(sum_squares(w), partial) * p.share + p.eps);
    read<kAligned>(v, p.branch_weight, 0, 0, d, count);
#pragma unroll
    for (int j = 0; j < kPack; j++) w[j] *= rstd * v[j];
  }
  if (p.gate.data) {
    read<kAligned>(v, p.gate, 0, b, d, count);
#pragma unroll
    for (int j = 0; j < kPack; j++) w[j] *= v[j];
  }
#pragma unroll
  for (int j = 0; j < kPack; j++) h[j] += w[j];
}

template <bool kAligned>
__device__ void normalise(float (&h)[kPack], const ResidualNorm& p, int d, int count,
                          float (&mean_partial)[kWarp], float (&square_partial)[kWarp]) {
  float v[kPack];
  if (!p.weight.data) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kPack; j++) sum += h[j];
    const float mean = block_sum(sum, mean_partial) * p.share;
#pragma unroll
    for (int j = 0; j < kPack; j++) h[j] = j < count ? h[j] - mean : 0.0f;
  }
  const float rstd = rsqrtf(block_sum(sum_squares(h), square_partial) * p.share + p.eps);
  if (p.weight.data) read<kAligned>(v, p.weight, 0, 0, d, count);
#pragma unroll
  for (int j = 0; j < kPack; j++) h[j] *= p.weight.data ? rstd * v[j] : rstd;
}

template <bool kAligned>
__device__ void modulate(const float (&h)[kPack], const ResidualNorm& p, int64_t m, int64_t b,
                         int64_t t, int d, int count) {
  float y[kPack], v[kPack];
#pragma unroll
  for (int j = 0; j < kPack; j++) y[j] = h[j];
  if (p.scale.data) {
    read<kAligned>(v, p.scale, m, b, d, count);
#pragma unroll
    for (int j = 0; j < kPack; j++) y[j] *= v[j];
  }
  if (p.shift.data) {
    read<kAligned>(v, p.shift, m, b, d, count);
#pragma unroll
    for (int j = 0; j < kPack; j++) y[j] += v[j];
  }
  const int64_t to = m * p.y_set + b * p.y.batch + t * p.y.row + d;
  store<kAligned>(narrow(y, p.y.type), p.y.data, p.y.type, to, count);
}

template <bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    residual_norm(const __grid_constant__ ResidualNorm p) {
  __shared__ float partial[3][kWarp];
  const int64_t t = blockIdx.x, b = blockIdx.y;
  const int d = threadIdx.x * kPack, count = int(p.D) - d;
  float h[kPack], w[kPack];
  const Pack x = load<kAligned>(p.x.data, p.x.type, b * p.x.batch + t * p.x.row + d, count);
  if (p.branch.data) {
    const int64_t from = b * p.branch.batch + t * p.branch.row + d;
    const Pack branch = load<kAligned>(p.branch.data, p.branch.type, from, count);
    widen(h, x, p.x.type);
    widen(w, branch, p.branch.type);
    add_branch<kAligned>(h, w, p, b, d, count, partial[0]);
    const Pack stored = narrow(h, p.h.type);
    const int64_t to = b * p.h.batch + t * p.h.row + d;
    store<kAligned>(stored, p.h.data, p.h.type, to, count);
    widen(h, stored, p.h.type);  // the norm reads h as it is stored
  } else {
    widen(h, x, p.x.type);
  }
  if (!p.y.data) return;
  normalise<kAligned>(h, p, d, count, partial[1], partial[2]);
  for (int64_t m = 0; m < p.M; m++) modulate<kAligned>(h, p, m, b, t, d, count);
}

}  // namespace

const char* launch(const ResidualNorm& p, void* stream) {
  if (!p.B || !p.T || !p.D) return nullptr;
  const int packs = int(p.D + kPack - 1) / kPack;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(p.T), unsigned(p.B));
  config.blockDim = dim3((packs + kWarp - 1) / kWarp * kWarp);
  config.stream = static_cast<cudaStream_t>(stream);
  const auto kernel = p.aligned ? residual_norm<true> : residual_norm<false>;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tdm::cuda
