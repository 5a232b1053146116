// What the CPU kernels take: raw rows, no tensors. The kernels are compiled once per
// instruction set (cpu_simd.h); cpu_ops.cpp checks tensors and calls the fastest set this machine runs.
//
// Legend: B batch, T tokens, D width, N heads, H head width, M modulations of one norm.
#pragma once

#include "rows.h"

namespace tdm {

// h = x + gate * [rms(branch) * branch_weight];  y_m = norm(h) * scale_m + shift_m.
// Without `branch`, h = x. norm is RMSNorm with `weight`, LayerNorm without. `stats` is fp32
// [B * T, 3]: mean and 1 / sigma of h, 1 / rms of the branch.
struct ResidualNorm {
  int64_t B, T, D, M;
  float eps;
  bool layer_norm;
  Rows x, branch, h, y;  // y: M slabs, `y_set` elements apart
  int64_t y_set = 0;
  Vectors gate, scale, shift;
  const float* branch_weight = nullptr;
  const float* weight = nullptr;
  float* stats = nullptr;
  // Backward: gradients of h and y come in (`dh`, `dy`), those of the inputs go out. Vectors are
  // summed over T into fp64 [M, B, D], weights into [B, D]; the caller sums the rest.
  Rows dh, dy, dx, dbranch;
  int64_t dy_set = 0;
  double* dgate = nullptr;
  double* dscale = nullptr;
  double* dshift = nullptr;
  double* dweight = nullptr;
  double* dbranch_weight = nullptr;
};

// out = rotate(x * rsqrt(mean(x^2) + eps) * weight) per head; `rope` holds (cos, sin) pairs along H.
struct HeadNorm {
  int64_t B, T, N, H;
  float eps;
  Rows x, out;  // plus a stride over heads
  int64_t x_head = 0, out_head = 0;
  const float* weight = nullptr;
  const float* rope = nullptr;
  int64_t rope_batch = 0, rope_row = 0;
  // Backward: `out` holds d out, `dx` receives d x, `dweight` fp64 [B, H] the weight's.
  Rows dx;
  int64_t dx_head = 0;
  double* dweight = nullptr;
};

struct Elementwise {
  const void* a;
  const void* b;
  const void* dy;
  void* out;
  void* out2;
  Type type;
};

// out = silu(gate) * up, row by row; [B, T, D] each.
struct SwiGLU {
  int64_t T, D;
  Rows gate, up, out;
};

// softmax(q k^T / sqrt(H)) v for T query and S key rows; strides as in HeadNorm, `out` [B, T, N, H].
// Of sample b the first `lengths[b]` keys count, without `lengths` all.
struct Attention {
  int64_t B, T, S, N, H;
  Rows q, k, v, out;
  int64_t q_head = 0, k_head = 0, v_head = 0, out_head = 0;
  const int64_t* lengths = nullptr;
  // Backward: `out` holds d out; dq, dk and dv go out, 0 beyond a length.
  Rows dq, dk, dv;
  int64_t dq_head = 0, dk_head = 0, dv_head = 0;
};

// out [B, T, N] = x [B, T, K] W^T + bias, then GELU-tanh if asked. `panels` is W [N, K] cut along N
// into pieces of kPanel columns, each stored as [K, kPanel], the last one filled up with zeros.
constexpr int64_t kPanel = 32, kPanelRows = 64;  // an item of work: one panel, 64 rows of x

struct Linear {
  int64_t B, T, N, K;
  const float* x = nullptr;
  int64_t x_batch = 0, x_row = 0;
  const float* panels = nullptr;
  const float* bias = nullptr;
  float* out = nullptr;
  int64_t out_batch = 0, out_row = 0;
  bool gelu = false;
};

// GroupNorm of x [B, P, C] as out = x * scale + shift, both [B, C].
struct GroupAffine {
  int64_t P, C, groups;
  float eps;
  const float* x;
  const float* weight;
  const float* bias;
  float* scale;
  float* shift;
};

// out = W * upsample(silu(x * scale + shift)) + bias + residual, images [B, H, W, channels], C in and
// O out; kernels of 1 or 3 pixels a side, zeros beyond the edges; scale and shift [B, C] may be
// absent, and SiLU with them. `upsample` repeats every pixel twice both ways. `panels` is W
// [O, C, kernel, kernel] cut along O into pieces of kConvPanel, each stored as
// [kernel, kernel, C, kConvPanel], the last one filled up with zeros; for `upsample` four such, the
// 2 x 2 kernels that make the pixels at (even, even), (even, odd), (odd, even) and (odd, odd).
constexpr int64_t kConvPanel = 16;

struct Conv {
  int64_t H, W, C, O;
  int64_t kernel;
  bool upsample;
  const float* x;
  const float* scale;
  const float* shift;
  const float* panels;
  const float* bias;
  const float* residual;
  float* out;
};

// One function per kernel and pass; each does the half-open range of the index named first.
struct Kernels {
  const char* name;
  void (*residual_norm)(const ResidualNorm&, int64_t row0, int64_t row1);
  void (*residual_norm_backward)(const ResidualNorm&, int64_t b0, int64_t b1);
  void (*head_norm)(const HeadNorm&, int64_t row0, int64_t row1);
  void (*head_norm_backward)(const HeadNorm&, int64_t b0, int64_t b1);
  void (*gelu)(const Elementwise&, int64_t i0, int64_t i1);
  void (*gelu_backward)(const Elementwise&, int64_t i0, int64_t i1);
  void (*swiglu)(const SwiGLU&, int64_t row0, int64_t row1);
  void (*swiglu_backward)(const Elementwise&, int64_t i0, int64_t i1);
  void (*attention)(const Attention&, int64_t head0, int64_t head1);
  void (*attention_backward)(const Attention&, int64_t head0, int64_t head1);
  void (*linear)(const Linear&, int64_t item0, int64_t item1);
  void (*group_affine)(const GroupAffine&, int64_t b0, int64_t b1);
  void (*conv)(const Conv&, int64_t row0, int64_t row1);
};

namespace portable {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}

}  // namespace tdm
