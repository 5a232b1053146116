// As much of CUDA as csrc/*.cu uses, for a C++ compiler: the kernels' own source runs on a CPU.
//
// The threads of a block are fibers. A warp runs for as long as it can before the next one starts, so
// that a missing barrier shows; blocks run one after another. What waits for ever, and what a device
// would refuse (16 bytes that are not aligned, a block that is too large), fails the launch.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = void*;
using cudaError_t = const char*;
constexpr cudaError_t cudaSuccess = nullptr;
inline const char* cudaGetErrorString(cudaError_t error) { return error; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulator {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 1 << 16;

struct Barrier {
  unsigned arrived = 0, round = 0;
};

struct Block {
  ucontext_t main, fiber[kMaxThreads];
  bool done[kMaxThreads];
  unsigned threads = 0, current = 0;
  bool progress = false;
  cudaError_t error = cudaSuccess;
  Barrier block, warp[kMaxThreads / kWarp];
  float shuffled[2][kMaxThreads];
  unsigned shuffles[kMaxThreads];
  std::function<void()> body;
};

inline Block& block() {
  static auto one = std::make_unique<Block>();
  return *one;
}

inline void wait(Barrier& barrier, unsigned members) {
  Block& b = block();
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    barrier.round++;
    b.progress = true;
    return;
  }
  const unsigned me = b.current, round = barrier.round;
  while (barrier.round == round) swapcontext(&b.fiber[me], &b.main);
}

inline void enter() {
  Block& b = block();
  b.body();
  b.done[b.current] = true;
  b.progress = true;
}

// Each access of 16 bytes passes here.
inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) block().error = "misaligned address";
}

}  // namespace emulator

struct ThreadIdx {
  struct X {
    operator unsigned() const { return emulator::block().current; }
  } x;
};
inline ThreadIdx threadIdx;
inline dim3 blockIdx, blockDim;

namespace emulator {

// Runs a warp for as long as it gets on; whether it did.
inline bool run_warp(unsigned first) {
  Block& b = block();
  for (unsigned turns = 0;; turns++) {
    b.progress = false;
    for (unsigned i = first; i < first + kWarp; i++) {
      b.current = i;
      if (!b.done[i]) swapcontext(&b.main, &b.fiber[i]);
    }
    if (!b.progress) return turns > 0;
  }
}

inline void run_block() {
  static std::vector<char> stacks(kMaxThreads * kStack);
  Block& b = block();
  b.block = {};
  for (unsigned i = 0; i < b.threads; i++) {
    b.done[i] = false, b.shuffles[i] = 0, b.warp[i / kWarp] = {};
    getcontext(&b.fiber[i]);
    b.fiber[i].uc_stack.ss_sp = stacks.data() + i * kStack;
    b.fiber[i].uc_stack.ss_size = kStack;
    b.fiber[i].uc_link = &b.main;
    makecontext(&b.fiber[i], enter, 0);
  }
  for (bool progress = true; progress && !b.error;) {
    progress = false;
    for (unsigned first = 0; first < b.threads; first += kWarp) progress |= run_warp(first);
  }
  for (unsigned i = 0; i < b.threads; i++)
    if (!b.done[i] && !b.error) b.error = "a thread waits for one that never comes";
}

}  // namespace emulator

template <class... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Params... params) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  if (!threads.x || threads.x > emulator::kMaxThreads || threads.x % emulator::kWarp || !grid.x ||
      !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535)
    return "invalid configuration argument";
  emulator::Block& b = emulator::block();
  b.threads = threads.x, b.error = cudaSuccess, b.body = [&] { kernel(params...); };
  blockDim = threads;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x && !b.error; x++)
        blockIdx = {x, y, z}, emulator::run_block();
  return b.error;
}

inline void __syncthreads() { emulator::wait(emulator::block().block, blockDim.x); }

inline float __shfl_xor_sync(unsigned mask, float v, int other) {
  emulator::Block& b = emulator::block();
  if (mask != 0xffffffffu) b.error = "only whole warps are emulated";
  const unsigned me = b.current, buffer = b.shuffles[me]++ % 2;  // the next shuffle may not overtake
  b.shuffled[buffer][me] = v;
  emulator::wait(b.warp[me / emulator::kWarp], emulator::kWarp);
  return b.shuffled[buffer][me ^ unsigned(other)];
}

struct uint4 {
  uint32_t x, y, z, w;
  uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) : x(x), y(y), z(z), w(w) {}
  uint4(const uint4&) = default;
  uint4& operator=(const uint4& from) {
    emulator::check_aligned(this);
    x = from.x, y = from.y, z = from.z, w = from.w;
    return *this;
  }
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* p) {
  if (sizeof(T) == 16) emulator::check_aligned(p);
  return *p;
}

inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

using __nv_bfloat16 = c10::BFloat16;
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 v) { return v.x; }

using __half = c10::Half;
inline __half __float2half_rn(float v) { return v; }
inline float __half2float(__half v) { return v; }
inline uint16_t __half_as_ushort(__half v) { return v.x; }
inline __half __ushort_as_half(uint16_t bits) { return {bits, c10::Half::from_bits()}; }
