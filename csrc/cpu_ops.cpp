// The ops on a CPU: checks, the choice of an instruction set, and torch's own threads.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "cpu.h"
#include "program.h"

namespace tdm {
namespace {

bool runs_avx2() {
#ifdef TDM_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool runs_avx512() {
#ifdef TDM_X86
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

Kernels named(const std::string& name) {
#ifdef TDM_X86
  if (name == "avx512" && runs_avx512()) return avx512::kernels();
  if (name == "avx2" && runs_avx2()) return avx2::kernels();
#endif
  STD_TORCH_CHECK(name == "portable", "instruction set ", name, " is not available here");
  return portable::kernels();
}

Kernels& kernels() {
  static Kernels chosen = named(runs_avx512() ? "avx512" : runs_avx2() ? "avx2" : "portable");
  return chosen;
}

constexpr int64_t kGrain = 16384;  // numbers per thread below which a second thread costs more

thread_local std::unique_ptr<Program> recording;

template <class Params>
void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t count,
         int64_t cost) {
  if (recording) {
    auto work = [kernel, params](int64_t begin, int64_t end) { kernel(params, begin, end); };
    recording->add(work, count, cost);
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  if (count <= grain) return kernel(params, 0, count);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    kernel(params, begin, end);
  });
}

// Shapes shared by both passes. y is [B, T, D], or [M, B, T, D] for M modulations of one norm.
ResidualNorm describe(const Tensor& x, const Optional& y, const Optional& branch,
                      const Optional& gate, const Optional& branch_weight, const Optional& weight,
                      const Optional& scale, double eps) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, T, D]");
  ResidualNorm p{};
  p.B = x.size(0), p.T = x.size(1), p.D = x.size(2);
  p.M = y && y->dim() == 4 ? y->size(0) : 1;
  p.eps = float(eps);
  p.layer_norm = !weight;
  p.branch = rows_of(branch, "branch", p.B, p.T, p.D);
  p.gate = vectors_of(gate, "gate", 1, p.B, p.D);
  p.scale = vectors_of(scale, "scale", p.M, p.B, p.D);
  p.weight = floats_of(weight, "weight", p.D);
  p.branch_weight = floats_of(branch_weight, "branch_weight", p.D);
  return p;
}

void residual_norm(Tensor x, Optional branch, Optional gate, Optional branch_weight,
                   Optional weight, Optional scale, Optional shift, double eps, Optional h,
                   Optional y, Optional stats) {
  ResidualNorm p = describe(x, y, branch, gate, branch_weight, weight, scale, eps);
  p.x = rows_of(x, "x", p.B, p.T, p.D);
  p.h = rows_of(h, "h", p.B, p.T, p.D);
  STD_TORCH_CHECK(!branch == !h, "a branch needs h, and h a branch");
  p.y = slabs_of(y, "y", p.M, p.B, p.T, p.D, p.y_set);
  p.shift = vectors_of(shift, "shift", p.M, p.B, p.D);
  p.stats = floats_of(stats, "stats", p.B * p.T * 3);
  run(kernels().residual_norm, p, p.B * p.T, p.D);
}

void residual_norm_backward(Optional dh, Optional dy, Tensor h, Optional branch, Optional gate,
                            Optional branch_weight, Optional weight, Optional scale, Tensor stats,
                            Optional dx, Optional dbranch, Optional dgate, Optional dbranch_weight,
                            Optional dweight, Optional dscale, Optional dshift) {
  ResidualNorm p = describe(h, dy, branch, gate, branch_weight, weight, scale, 0.0);
  STD_TORCH_CHECK(dh || dy, "one of dh and dy is needed");
  p.h = rows_of(h, "h", p.B, p.T, p.D);
  p.dh = rows_of(dh, "dh", p.B, p.T, p.D);
  p.dy = slabs_of(dy, "dy", p.M, p.B, p.T, p.D, p.dy_set);
  p.dx = rows_of(dx, "dx", p.B, p.T, p.D);
  p.dbranch = rows_of(dbranch, "dbranch", p.B, p.T, p.D);
  p.stats = floats_of(stats, "stats", p.B * p.T * 3);
  p.dgate = sums_of(dgate, "dgate", p.B * p.D);
  p.dbranch_weight = sums_of(dbranch_weight, "dbranch_weight", p.B * p.D);
  p.dweight = sums_of(dweight, "dweight", p.B * p.D);
  p.dscale = sums_of(dscale, "dscale", p.M * p.B * p.D);
  p.dshift = sums_of(dshift, "dshift", p.M * p.B * p.D);
  run(kernels().residual_norm_backward, p, p.B, p.T * p.D);
}

HeadNorm describe(const Tensor& x, const Optional& weight, const Optional& rope, double eps) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, T, N, H]");
  HeadNorm p{};
  p.B = x.size(0), p.T = x.size(1), p.N = x.size(2), p.H = x.size(3);
  p.eps = float(eps);
  p.x = heads_of(x, "x", p.B, p.T, p.N, p.H, p.x_head);
  p.weight = floats_of(weight, "weight", p.H);
  const Rows table = rope_of(rope, p.B, p.T, p.H);
  p.rope = static_cast<const float*>(table.data);
  p.rope_batch = table.batch;
  p.rope_row = table.row;
  return p;
}

void head_norm(Tensor x, Optional weight, Optional rope, double eps, Tensor out) {
  HeadNorm p = describe(x, weight, rope, eps);
  p.out = heads_of(out, "out", p.B, p.T, p.N, p.H, p.out_head);
  run(kernels().head_norm, p, p.B * p.T, p.N * p.H);
}

// q and k in one call; from row `tail` on with weights of their own, where there are any.
void qk_norm(Tensor q, Tensor k, Optional weight_q, Optional weight_k, int64_t tail,
             Optional tail_q, Optional tail_k, Optional rope, double eps, Tensor out_q,
             Tensor out_k) {
  const auto part = [&](const Tensor& x, const Optional& weight, const Tensor& out, int64_t first,
                        int64_t count) {
    HeadNorm p = describe(x, weight, rope, eps);
    p.out = heads_of(out, "out", p.B, p.T, p.N, p.H, p.out_head);
    STD_TORCH_CHECK(first >= 0 && first + count <= p.T, "tail must be from 0 to ", p.T);
    p.x = offset(p.x, first * p.x.row), p.out = offset(p.out, first * p.out.row);
    p.T = count;
    run(kernels().head_norm, p, p.B * p.T, p.N * p.H);
  };
  STD_TORCH_CHECK(!tail_q == !tail_k && !(tail_q && rope), "a tail has two weights and no rope");
  const int64_t first = tail_q ? tail : q.size(1);
  part(q, weight_q, out_q, 0, first);
  part(k, weight_k, out_k, 0, tail_q ? tail : k.size(1));
  if (tail_q) {
    part(q, tail_q, out_q, tail, q.size(1) - tail);
    part(k, tail_k, out_k, tail, k.size(1) - tail);
  }
}

void head_norm_backward(Tensor dout, Tensor x, Optional weight, Optional rope, double eps,
                        Tensor dx, Optional dweight) {
  HeadNorm p = describe(x, weight, rope, eps);
  p.out = heads_of(dout, "dout", p.B, p.T, p.N, p.H, p.out_head);
  p.dx = heads_of(dx, "dx", p.B, p.T, p.N, p.H, p.dx_head);
  p.dweight = sums_of(dweight, "dweight", p.B * p.H);
  run(kernels().head_norm_backward, p, p.B, p.T * p.N * p.H);
}

void* flat(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == like.numel() &&
                      x.scalar_type() == like.scalar_type(),
                  name, " must be contiguous, of the first tensor's size and dtype");
  return x.data_ptr();
}

void gelu(Tensor x, Tensor out) {
  Elementwise p{flat(x, "x", x), nullptr, nullptr, flat(out, "out", x), nullptr, type_of(x, "x")};
  run(kernels().gelu, p, x.numel(), 4);
}

void gelu_backward(Tensor dy, Tensor x, Tensor dx) {
  Elementwise p{flat(x, "x", x),   nullptr, flat(dy, "dy", x),
                flat(dx, "dx", x), nullptr, type_of(x, "x")};
  run(kernels().gelu_backward, p, x.numel(), 4);
}

void swiglu(Tensor gate, Tensor up, Tensor out) {
  STD_TORCH_CHECK(gate.dim() == 3, "gate must be [B, T, F]");
  const int64_t B = gate.size(0), T = gate.size(1), D = gate.size(2);
  const SwiGLU p{T, D, rows_of(gate, "gate", B, T, D), rows_of(up, "up", B, T, D),
                 rows_of(out, "out", B, T, D)};
  STD_TORCH_CHECK(p.up.type == p.gate.type && p.out.type == p.gate.type,
                  "gate, up and out must be of one dtype");
  run(kernels().swiglu, p, B * T, 4 * D);
}

void swiglu_backward(Tensor dy, Tensor gate, Tensor up, Tensor dgate, Tensor dup) {
  Elementwise p{flat(gate, "gate", gate),   flat(up, "up", gate),   flat(dy, "dy", gate),
                flat(dgate, "dgate", gate), flat(dup, "dup", gate), type_of(gate, "gate")};
  run(kernels().swiglu_backward, p, gate.numel(), 4);
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& lengths,
                   const Tensor& out) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be [B, T, N, H]");
  Attention p{};
  p.B = q.size(0), p.T = q.size(1), p.N = q.size(2), p.H = q.size(3), p.S = k.size(1);
  STD_TORCH_CHECK(p.S > 0, "there must be a key");
  p.lengths = counts_of(lengths, "lengths", p.B);
  for (int64_t b = 0; lengths && b < p.B; b++)
    STD_TORCH_CHECK(0 < p.lengths[b] && p.lengths[b] <= p.S, "lengths must be 1 to ", p.S, ", not ",
                    p.lengths[b]);
  p.q = heads_of(q, "q", p.B, p.T, p.N, p.H, p.q_head);
  p.k = heads_of(k, "k", p.B, p.S, p.N, p.H, p.k_head);
  p.v = heads_of(v, "v", p.B, p.S, p.N, p.H, p.v_head);
  p.out = heads_of(out, "out", p.B, p.T, p.N, p.H, p.out_head);
  return p;
}

void attention(Tensor q, Tensor k, Tensor v, Optional lengths, Tensor out) {
  const Attention p = describe(q, k, v, lengths, out);
  run(kernels().attention, p, p.B * p.N, p.T * p.S * p.H / 8);
}

void attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Optional lengths, Tensor dq,
                        Tensor dk, Tensor dv) {
  Attention p = describe(q, k, v, lengths, dout);
  p.dq = heads_of(dq, "dq", p.B, p.T, p.N, p.H, p.dq_head);
  p.dk = heads_of(dk, "dk", p.B, p.S, p.N, p.H, p.dk_head);
  p.dv = heads_of(dv, "dv", p.B, p.S, p.N, p.H, p.dv_head);
  run(kernels().attention_backward, p, p.B * p.N, p.T * p.S * p.H / 3);
}

void pack_panels(Tensor weight, Tensor panels) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be contiguous [N, K]");
  const int64_t N = weight.size(0), K = weight.size(1), count = (N + kPanel - 1) / kPanel;
  const float* from = floats_of(weight, "weight", N * K);
  float* to = floats_of(panels, "panels", count * kPanel * K);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      for (int64_t c = 0; c < kPanel; c++)
        for (int64_t k = 0; k < K; k++) {
          const int64_t n = p * kPanel + c;
          to[(p * K + k) * kPanel + c] = n < N ? from[n * K + k] : 0.0f;
        }
  });
}

void linear(Tensor x, Tensor panels, Optional bias, int64_t N, bool gelu, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, T, K]");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Float,
                  "x and out must be float32");
  Linear p{};
  p.B = x.size(0), p.T = x.size(1), p.N = N, p.K = x.size(2);
  const Rows from = rows_of(x, "x", p.B, p.T, p.K), to = rows_of(out, "out", p.B, p.T, N);
  const int64_t M = p.B * p.T, count = (N + kPanel - 1) / kPanel;
  const int64_t chunks = (M + kPanelRows - 1) / kPanelRows;
  p.x = static_cast<const float*>(from.data), p.x_batch = from.batch, p.x_row = from.row;
  p.out = static_cast<float*>(to.data), p.out_batch = to.batch, p.out_row = to.row;
  p.panels = floats_of(panels, "panels", count * kPanel * p.K);
  p.bias = floats_of(bias, "bias", N);
  p.gelu = gelu;
  run(kernels().linear, p, count * chunks, std::min(M, kPanelRows) * kPanel * p.K / 16);
}

// An [B, H, W, C] fp32 image batch, contiguous.
float* images_of(const Tensor& x, const char* name, int64_t B, int64_t H, int64_t W, int64_t C) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == B && x.size(1) == H && x.size(2) == W &&
                      x.size(3) == C,
                  name, " must be [", B, ", ", H, ", ", W, ", ", C, "]");
  return floats_of(x, name, B * H * W * C);
}

void group_affine(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps, Tensor scale,
                  Tensor shift) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, H, W, C]");
  const int64_t B = x.size(0), P = x.size(1) * x.size(2), C = x.size(3);
  STD_TORCH_CHECK(groups > 0 && C % groups == 0, groups, " groups do not divide ", C, " channels");
  const GroupAffine p{P,
                      C,
                      groups,
                      float(eps),
                      floats_of(x, "x", B * P * C),
                      floats_of(weight, "weight", C),
                      floats_of(bias, "bias", C),
                      floats_of(scale, "scale", B * C),
                      floats_of(shift, "shift", B * C)};
  run(kernels().group_affine, p, B, 2 * P * C);
}

void conv(Tensor x, Optional scale, Optional shift, Tensor panels, Optional bias, Optional residual,
          int64_t kernel, bool upsample, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4, "x and out must be [B, H, W, channels]");
  STD_TORCH_CHECK(kernel == 1 || kernel == 3, "kernels of 1 or 3 pixels a side, not ", kernel);
  STD_TORCH_CHECK(!upsample || kernel == 3, "upsampling takes a kernel of 3 pixels a side");
  STD_TORCH_CHECK(!scale == !shift, "scale and shift come together");
  Conv p{};
  const int64_t B = x.size(0), times = upsample ? 2 : 1;
  p.H = x.size(1), p.W = x.size(2), p.C = x.size(3), p.O = out.size(3);
  p.kernel = kernel, p.upsample = upsample;
  p.x = images_of(x, "x", B, p.H, p.W, p.C);
  p.scale = floats_of(scale, "scale", B * p.C), p.shift = floats_of(shift, "shift", B * p.C);
  const int64_t taps = upsample ? 16 : kernel * kernel;
  const int64_t columns = (p.O + kConvPanel - 1) / kConvPanel * kConvPanel;
  p.panels = floats_of(panels, "panels", columns * taps * p.C);
  p.bias = floats_of(bias, "bias", p.O);
  p.out = images_of(out, "out", B, times * p.H, times * p.W, p.O);
  if (residual)
    p.residual = images_of(*residual, "residual", B, times * p.H, times * p.W, p.O);
  run(kernels().conv, p, B * p.H, p.W * p.C * columns * taps / 16);
}

// Programs by number. A program is not changed once it is here.
std::mutex programs_mutex;
std::map<int64_t, std::shared_ptr<const Program>> programs;

void record() {
  STD_TORCH_CHECK(!recording, "this thread is recording already");
  recording = std::make_unique<Program>();
}

// Ends the recording; returns the program's number.
int64_t recorded() {
  STD_TORCH_CHECK(recording, "this thread is not recording");
  const std::lock_guard<std::mutex> lock(programs_mutex);
  static int64_t last = 0;
  programs[++last] = std::move(recording);
  return last;
}

void replay(int64_t number, int64_t threads) {
  std::shared_ptr<const Program> program;
  {
    const std::lock_guard<std::mutex> lock(programs_mutex);
    const auto found = programs.find(number);
    STD_TORCH_CHECK(found != programs.end(), "there is no program ", number);
    program = found->second;
  }
  program->replay(std::max<int64_t>(1, threads), [](int64_t count, const Work& body) {
    torch::stable::parallel_for(0, count, 1, body);
  });
}

void forget(int64_t number) {
  const std::lock_guard<std::mutex> lock(programs_mutex);
  programs.erase(number);
}

std::string instruction_set() { return kernels().name; }

void use_instruction_set(std::string name) { kernels() = named(name); }

}  // namespace
}  // namespace tdm

STABLE_TORCH_LIBRARY_IMPL(tdm_kernels, CPU, m) {
  m.impl("residual_norm", TORCH_BOX(&tdm::residual_norm));
  m.impl("residual_norm_backward", TORCH_BOX(&tdm::residual_norm_backward));
  m.impl("head_norm", TORCH_BOX(&tdm::head_norm));
  m.impl("qk_norm", TORCH_BOX(&tdm::qk_norm));
  m.impl("head_norm_backward", TORCH_BOX(&tdm::head_norm_backward));
  m.impl("gelu", TORCH_BOX(&tdm::gelu));
  m.impl("gelu_backward", TORCH_BOX(&tdm::gelu_backward));
  m.impl("swiglu", TORCH_BOX(&tdm::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&tdm::swiglu_backward));
  m.impl("attention", TORCH_BOX(&tdm::attention));
  m.impl("attention_backward", TORCH_BOX(&tdm::attention_backward));
  m.impl("pack_panels", TORCH_BOX(&tdm::pack_panels));
  m.impl("linear", TORCH_BOX(&tdm::linear));
  m.impl("group_affine", TORCH_BOX(&tdm::group_affine));
  m.impl("conv", TORCH_BOX(&tdm::conv));
}

STABLE_TORCH_LIBRARY_IMPL(tdm_kernels, CompositeExplicitAutograd, m) {
  m.impl("record", TORCH_BOX(&tdm::record));
  m.impl("recorded", TORCH_BOX(&tdm::recorded));
  m.impl("replay", TORCH_BOX(&tdm::replay));
  m.impl("forget", TORCH_BOX(&tdm::forget));
  m.impl("instruction_set", TORCH_BOX(&tdm::instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&tdm::use_instruction_set));
}
