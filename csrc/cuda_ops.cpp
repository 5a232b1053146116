// The ops on a CUDA device: checks, alignment, and the stream of the torch that is loaded.
#include <algorithm>
#include <initializer_list>
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "check.h"
#include "cuda.h"

// Weak: a torch without CUDA lacks it, and loads this library all the same. The device-neutral
// accelerator::Stream gives up its handle from torch 2.13 on only.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace tdm::cuda {
namespace {

constexpr int64_t kMaxBatch = 65535, kMaxTokens = 2147483647;  // of a grid

int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

// Whether reads of eight numbers from `data`, and from any of its strides on, start at 16 bytes.
bool aligned(const void* data, Type type, std::initializer_list<int64_t> strides) {
  if (!data) return true;
  const auto whole = [](int64_t bytes) { return bytes % 16 == 0; };
  return whole(reinterpret_cast<intptr_t>(data)) &&
         std::all_of(strides.begin(), strides.end(),
                     [&](int64_t stride) { return whole(stride * bytes_of(type)); });
}

bool aligned(const Rows& x, int64_t stride = 0) {
  return aligned(x.data, x.type, {x.batch, x.row, stride});
}

bool aligned(const Vectors& v) { return aligned(v.data, v.type, {v.set, v.batch}); }

// A kernel would read another device's memory as its own.
void check_device(const Tensor& x, std::initializer_list<const Optional*> others) {
  for (const Optional* other : others)
    STD_TORCH_CHECK(!*other || (*other)->device() == x.device(),
                    "all tensors must be on the device of the first");
}

Vectors weight_of(const Optional& x, const char* name, int64_t width) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_contiguous() && x->numel() == width, name, " must be ", width,
                  " contiguous numbers");
  return {x->data_ptr(), type_of<true>(*x, name)};
}

template <class Params>
void run(const Tensor& x, const Params& p) {
  STD_TORCH_CHECK(p.B <= kMaxBatch && p.T <= kMaxTokens, "there are too many rows: ", p.B, " x ", p.T);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = launch(p, stream);
  STD_TORCH_CHECK(!error, "the kernel did not start: ", error ? error : "");
}

void residual_norm(Tensor x, Optional branch, Optional gate, Optional branch_weight,
                   Optional weight, Optional scale, Optional shift, double eps, Optional h,
                   Optional y, Optional stats) {
  STD_TORCH_CHECK(!stats, "the CUDA kernels have no backward pass");
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, T, D]");
  STD_TORCH_CHECK(!branch == !h, "a branch needs h, and h a branch");
  check_device(x, {&branch, &gate, &branch_weight, &weight, &scale, &shift, &h, &y});
  ResidualNorm p{};
  p.B = x.size(0), p.T = x.size(1), p.D = x.size(2);
  p.eps = float(eps), p.share = 1.0f / p.D;
  STD_TORCH_CHECK(p.D <= kMaxWidth, "rows must be at most ", kMaxWidth, " wide, not ", p.D);
  p.M = y && y->dim() == 4 ? y->size(0) : 1;
  p.x = rows_of<true>(x, "x", p.B, p.T, p.D);
  p.branch = rows_of<true>(branch, "branch", p.B, p.T, p.D);
  p.h = rows_of<true>(h, "h", p.B, p.T, p.D);
  p.y = slabs_of<true>(y, "y", p.M, p.B, p.T, p.D, p.y_set);
  p.gate = vectors_of<true>(gate, "gate", 1, p.B, p.D);
  p.scale = vectors_of<true>(scale, "scale", p.M, p.B, p.D);
  p.shift = vectors_of<true>(shift, "shift", p.M, p.B, p.D);
  p.branch_weight = weight_of(branch_weight, "branch_weight", p.D);
  p.weight = weight_of(weight, "weight", p.D);
  p.aligned = p.D % 8 == 0 && aligned(p.x) && aligned(p.branch) && aligned(p.h) &&
              aligned(p.y, p.y_set) && aligned(p.gate) && aligned(p.scale) && aligned(p.shift) &&
              aligned(p.branch_weight) && aligned(p.weight);
  run(x, p);
}

Heads side_of(const Tensor& x, const Tensor& out, const Optional& weight, const char* name,
              const HeadNorm& p) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [B, T, N, H]");
  Heads side{};
  side.N = x.size(2);
  side.x = heads_of<true>(x, name, p.B, p.T, side.N, p.H, side.x_head);
  side.out = heads_of<true>(out, "out", p.B, p.T, side.N, p.H, side.out_head);
  side.weight = weight_of(weight, "weight", p.H);
  return side;
}

bool aligned(const Heads& side) {
  return aligned(side.x, side.x_head) && aligned(side.out, side.out_head) && aligned(side.weight);
}

void head_norms(Tensor q, Optional k, Optional weight_q, Optional weight_k, Optional rope,
                double eps, Tensor out_q, Optional out_k) {
  STD_TORCH_CHECK(q.dim() == 4, "q must be [B, T, N, H]");
  STD_TORCH_CHECK(!k == !out_k, "k needs out_k, and out_k k");
  check_device(q, {&k, &weight_q, &weight_k, &rope, &out_k});
  STD_TORCH_CHECK(out_q.device() == q.device(), "all tensors must be on the device of the first");
  HeadNorm p{};
  p.B = q.size(0), p.T = q.size(1), p.H = q.size(3);
  p.eps = float(eps), p.share = 1.0f / p.H;
  STD_TORCH_CHECK(p.H <= kMaxHead, "heads must be at most ", kMaxHead, " wide, not ", p.H);
  p.sides = k ? 2 : 1;
  p.side[0] = side_of(q, out_q, weight_q, "q", p);
  if (k) p.side[1] = side_of(*k, *out_k, weight_k, "k", p);
  p.rope = rope_of(rope, p.B, p.T, p.H);
  p.aligned = p.H % 8 == 0 && aligned(p.side[0]) && aligned(p.side[1]) && aligned(p.rope);
  run(q, p);
}

std::string cuda_architectures() { return TDM_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace tdm::cuda

STABLE_TORCH_LIBRARY_IMPL(tdm_kernels, CUDA, m) {
  m.impl("residual_norm", TORCH_BOX(&tdm::cuda::residual_norm));
  m.impl("head_norms", TORCH_BOX(&tdm::cuda::head_norms));
}

STABLE_TORCH_LIBRARY_IMPL(tdm_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&tdm::cuda::cuda_architectures));
}
