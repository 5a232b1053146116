// What the CUDA kernels take: raw rows, no tensors. cuda_ops.cpp checks tensors; each .cu file holds
// the kernel of one op and its launch. Forward only.
//
// Legend: B batch, T tokens, D width, N heads, H head width, M modulations of one norm.
#pragma once

#include "rows.h"

namespace tdm::cuda {

constexpr int64_t kMaxWidth = 8192;  // a row is held by one block, 8 numbers a thread
constexpr int64_t kMaxHead = 256;    // and a head by one warp

// h = x + gate * [rms(branch) * branch_weight];  y_m = norm(h) * scale_m + shift_m.
// Without `branch`, h = x. norm is RMSNorm with `weight`, LayerNorm without.
struct ResidualNorm {
  int64_t B, T, D, M;
  float eps, share;  // share = 1 / D
  bool aligned;  // every row and vector starts at 16 bytes, and D is a multiple of 8
  Rows x, branch, h, y;
  int64_t y_set = 0;
  Vectors gate, branch_weight, weight, scale, shift;
};

// One of q and k: out = rotate(x * rsqrt(mean(x^2) + eps) * weight) per head.
struct Heads {
  int64_t N = 0;
  Rows x, out;  // plus a stride over heads
  int64_t x_head = 0, out_head = 0;
  Vectors weight;
};

// `rope` holds (cos, sin) pairs along H, in fp32.
struct HeadNorm {
  int64_t B, T, H;
  float eps, share;  // share = 1 / H
  bool aligned;  // as above, for heads
  int sides;     // 1, or 2 for q and k in one launch
  Heads side[2];
  Rows rope;
};

// Each returns null or what the launch failed with. `stream` is a cudaStream_t.
const char* launch(const ResidualNorm& p, void* stream);
const char* launch(const HeadNorm& p, void* stream);

}  // namespace tdm::cuda
