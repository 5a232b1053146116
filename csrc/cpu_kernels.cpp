// The CPU kernels, written as plain loops for the compiler to vectorise: this file is compiled once
// per instruction set, with TDM_ISA naming the namespace. All arithmetic is fp32.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu.h"

namespace tdm::TDM_ISA {
namespace {

using bf16 = uint16_t;

inline float load(float v) { return v; }
inline float load(bf16 v) {
  uint32_t bits = uint32_t(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <class T>
inline T store(float v);
template <>
inline float store<float>(float v) {
  return v;
}
template <>
inline bf16 store<bf16>(float v) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return bf16(v != v ? 0x7fc0 : rounded);
}

// e^x within 2 ulp (Cephes' polynomial), infinite from 88.4 on; NaN passes through.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + magic;
  int32_t n;
  std::memcpy(&n, &shifted, 4);
  const float whole = shifted - magic;
  float r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = int32_t(uint32_t(n - 0x4b400000 + 127) << 23);
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// 2 u of GELU's tanh argument u = sqrt(2 / pi) (x + 0.044715 x^3): 0.5 (1 + tanh u) = sigmoid(2 u).
constexpr float kLinear = 1.5957691216f, kCubic = 0.044715f * 1.5957691216f;

inline float gelu_one(float x) { return x * sigmoid(x * (kLinear + kCubic * x * x)); }

inline float gelu_slope(float x) {
  const float s = sigmoid(x * (kLinear + kCubic * x * x));
  return s + x * s * (1.0f - s) * (kLinear + 3.0f * kCubic * x * x);
}

template <class T>
inline T* at(const Rows& rows, int64_t b, int64_t t) {
  return static_cast<T*>(rows.data) + b * rows.batch + t * rows.row;
}

inline float* at(const Vectors& v, int64_t m, int64_t b) {
  return static_cast<float*>(v.data) + m * v.set + b * v.batch;
}

template <class T>
inline void widen(float* __restrict out, const T* __restrict in, int64_t n) {
  for (int64_t d = 0; d < n; d++) out[d] = load(in[d]);
}

template <class T>
inline void narrow(T* __restrict out, const float* __restrict in, int64_t n) {
  for (int64_t d = 0; d < n; d++) out[d] = store<T>(in[d]);
}

inline float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; d++) sum += a[d] * b[d];
  return sum;
}

inline float total(const float* __restrict a, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; d++) sum += a[d];
  return sum;
}

inline float squares_about(const float* __restrict a, float mean, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; d++) sum += (a[d] - mean) * (a[d] - mean);
  return sum;
}

void read(float* out, const Rows& rows, int64_t b, int64_t t, int64_t n) {
  if (rows.type == Type::bf16)
    widen(out, at<const bf16>(rows, b, t), n);
  else
    widen(out, at<const float>(rows, b, t), n);
}

void write(const Rows& rows, int64_t b, int64_t t, const float* in, int64_t n) {
  if (rows.type == Type::bf16)
    narrow(at<bf16>(rows, b, t), in, n);
  else
    narrow(at<float>(rows, b, t), in, n);
}

// Buffers of one thread: rows of D floats.
struct Scratch {
  explicit Scratch(int64_t width, int count) : width(width), data(width * count) {}
  float* row(int i) { return data.data() + i * width; }
  int64_t width;
  std::vector<float> data;
};

void residual_norm(const ResidualNorm& p, int64_t row0, int64_t row1) {
  const int64_t D = p.D;
  Scratch scratch(D, 2);
  float* __restrict h = scratch.row(0);
  float* __restrict w = scratch.row(1);
  for (int64_t row = row0; row < row1; row++) {
    const int64_t b = row / p.T, t = row % p.T;
    float* stats = p.stats ? p.stats + row * 3 : nullptr;
    read(h, p.x, b, t, D);
    if (p.branch.data) {
      read(w, p.branch, b, t, D);
      if (p.branch_weight) {
        const float rstd = 1.0f / std::sqrt(dot(w, w, D) / D + p.eps);
        for (int64_t d = 0; d < D; d++) w[d] *= rstd * p.branch_weight[d];
        if (stats) stats[2] = rstd;
      }
      if (p.gate.data) {
        const float* __restrict gate = at(p.gate, 0, b);
        for (int64_t d = 0; d < D; d++) h[d] += gate[d] * w[d];
      } else {
        for (int64_t d = 0; d < D; d++) h[d] += w[d];
      }
      write(p.h, b, t, h, D);
      if (p.h.type == Type::bf16) read(h, p.h, b, t, D);  // the norm reads h as it is stored
    }
    if (!p.y.data) continue;
    const float mean = p.layer_norm ? total(h, D) / D : 0.0f;
    const float rstd = 1.0f / std::sqrt(squares_about(h, mean, D) / D + p.eps);
    if (stats) stats[0] = mean, stats[1] = rstd;
    if (p.layer_norm)
      for (int64_t d = 0; d < D; d++) h[d] = (h[d] - mean) * rstd;
    else
      for (int64_t d = 0; d < D; d++) h[d] *= rstd * p.weight[d];
    for (int64_t m = 0; m < p.M; m++) {
      const float* out = h;
      if (p.scale.data) {
        const float* __restrict scale = at(p.scale, m, b);
        if (p.shift.data) {
          const float* __restrict shift = at(p.shift, m, b);
          for (int64_t d = 0; d < D; d++) w[d] = h[d] * scale[d] + shift[d];
        } else {
          for (int64_t d = 0; d < D; d++) w[d] = h[d] * scale[d];
        }
        out = w;
      }
      write(offset(p.y, m * p.y_set), b, t, out, D);
    }
  }
}

inline void accumulate(float* __restrict sum, const float* __restrict a, const float* __restrict b,
                       int64_t n) {
  for (int64_t d = 0; d < n; d++) sum[d] += a[d] * b[d];
}

// Sums over tokens run in fp64: thousands of fp32 additions one after another would lose digits.
inline void accumulate(double* __restrict sum, const float* __restrict a,
                       const float* __restrict b, int64_t n) {
  for (int64_t d = 0; d < n; d++) sum[d] += double(a[d] * b[d]);
}

// g <- rstd (g - [mean g] - n mean(g n)): through a normalisation with result n.
inline void through_norm(float* __restrict g, const float* __restrict n, float rstd, bool centred,
                         int64_t D) {
  const float mean = centred ? total(g, D) / D : 0.0f;
  const float slope = dot(g, n, D) / D;
  for (int64_t d = 0; d < D; d++) g[d] = rstd * (g[d] - mean - n[d] * slope);
}

void residual_norm_backward(const ResidualNorm& p, int64_t b0, int64_t b1) {
  const int64_t D = p.D;
  Scratch scratch(D, 4);
  float* __restrict dh = scratch.row(0);
  float* __restrict n = scratch.row(1);
  float* __restrict dy = scratch.row(2);
  float* __restrict g = scratch.row(3);
  for (int64_t b = b0; b < b1; b++)
    for (int64_t t = 0; t < p.T; t++) {
      const float* stats = p.stats + (b * p.T + t) * 3;
      if (p.dy.data) {
        const float mean = stats[0], rstd = stats[1];
        read(n, p.h, b, t, D);
        for (int64_t d = 0; d < D; d++) n[d] = (n[d] - mean) * rstd, g[d] = 0.0f;
        for (int64_t m = 0; m < p.M; m++) {
          read(dy, offset(p.dy, m * p.dy_set), b, t, D);
          if (!p.scale.data) {
            for (int64_t d = 0; d < D; d++) g[d] += dy[d];
            continue;
          }
          accumulate(g, dy, at(p.scale, m, b), D);
          if (p.dshift) {
            double* __restrict sum = p.dshift + (m * p.B + b) * D;
            for (int64_t d = 0; d < D; d++) sum[d] += double(dy[d]);
          }
          if (p.dscale) {
            double* __restrict sum = p.dscale + (m * p.B + b) * D;
            if (p.layer_norm)
              accumulate(sum, dy, n, D);
            else
              for (int64_t d = 0; d < D; d++) sum[d] += double(dy[d] * n[d] * p.weight[d]);
          }
        }
        if (!p.layer_norm) {
          if (p.dweight) accumulate(p.dweight + b * D, g, n, D);
          for (int64_t d = 0; d < D; d++) g[d] *= p.weight[d];
        }
        through_norm(g, n, rstd, p.layer_norm, D);
      }
      if (p.dh.data) {
        read(dh, p.dh, b, t, D);
        if (p.dy.data)
          for (int64_t d = 0; d < D; d++) dh[d] += g[d];
      } else {
        std::memcpy(dh, g, D * sizeof(float));
      }
      if (p.dx.data) write(p.dx, b, t, dh, D);
      if (!p.branch.data) continue;
      read(n, p.branch, b, t, D);
      const float rstd = p.branch_weight ? stats[2] : 1.0f;
      if (p.branch_weight)
        for (int64_t d = 0; d < D; d++) n[d] *= rstd;
      if (p.dgate) {
        double* __restrict sum = p.dgate + b * D;
        if (p.branch_weight)
          for (int64_t d = 0; d < D; d++) sum[d] += double(dh[d] * n[d] * p.branch_weight[d]);
        else
          accumulate(sum, dh, n, D);
      }
      if (p.gate.data) {
        const float* __restrict gate = at(p.gate, 0, b);
        for (int64_t d = 0; d < D; d++) dh[d] *= gate[d];
      }
      if (p.branch_weight) {
        if (p.dbranch_weight) accumulate(p.dbranch_weight + b * D, dh, n, D);
        for (int64_t d = 0; d < D; d++) dh[d] *= p.branch_weight[d];
        through_norm(dh, n, rstd, false, D);
      }
      if (p.dbranch.data) write(p.dbranch, b, t, dh, D);
    }
}

// (a, b) -> (a cos - b sin, a sin + b cos); `sign` -1 turns back.
inline void rotate(float* __restrict x, const float* __restrict turns, float sign, int64_t H) {
  for (int64_t i = 0; i < H / 2; i++) {
    const float a = x[2 * i], b = x[2 * i + 1], c = turns[2 * i], s = sign * turns[2 * i + 1];
    x[2 * i] = a * c - b * s;
    x[2 * i + 1] = a * s + b * c;
  }
}

void head_norm(const HeadNorm& p, int64_t row0, int64_t row1) {
  const int64_t H = p.H;
  Scratch scratch(H, 1);
  float* __restrict x = scratch.row(0);
  for (int64_t row = row0; row < row1; row++) {
    const int64_t b = row / p.T, t = row % p.T;
    for (int64_t n = 0; n < p.N; n++) {
      read(x, offset(p.x, n * p.x_head), b, t, H);
      if (p.weight) {
        const float rstd = 1.0f / std::sqrt(dot(x, x, H) / H + p.eps);
        for (int64_t d = 0; d < H; d++) x[d] *= rstd * p.weight[d];
      }
      if (p.rope) rotate(x, p.rope + b * p.rope_batch + t * p.rope_row, 1.0f, H);
      write(offset(p.out, n * p.out_head), b, t, x, H);
    }
  }
}

void head_norm_backward(const HeadNorm& p, int64_t b0, int64_t b1) {
  const int64_t H = p.H;
  Scratch scratch(H, 2);
  float* __restrict g = scratch.row(0);
  float* __restrict x = scratch.row(1);
  for (int64_t b = b0; b < b1; b++)
    for (int64_t t = 0; t < p.T; t++)
      for (int64_t n = 0; n < p.N; n++) {
        read(g, offset(p.out, n * p.out_head), b, t, H);
        if (p.rope) rotate(g, p.rope + b * p.rope_batch + t * p.rope_row, -1.0f, H);
        if (p.weight) {
          read(x, offset(p.x, n * p.x_head), b, t, H);
          const float rstd = 1.0f / std::sqrt(dot(x, x, H) / H + p.eps);
          for (int64_t d = 0; d < H; d++) x[d] *= rstd;
          if (p.dweight) accumulate(p.dweight + b * H, g, x, H);
          for (int64_t d = 0; d < H; d++) g[d] *= p.weight[d];
          through_norm(g, x, rstd, false, H);
        }
        write(offset(p.dx, n * p.dx_head), b, t, g, H);
      }
}

template <class T>
const T* in(const void* data) {
  return static_cast<const T*>(data);
}
template <class T>
T* out(void* data) {
  return static_cast<T*>(data);
}

template <class T>
void gelu_typed(const Elementwise& p, int64_t i0, int64_t i1) {
  const T* __restrict x = in<T>(p.a);
  T* __restrict y = out<T>(p.out);
  for (int64_t i = i0; i < i1; i++) y[i] = store<T>(gelu_one(load(x[i])));
}

template <class T>
void gelu_backward_typed(const Elementwise& p, int64_t i0, int64_t i1) {
  const T* __restrict x = in<T>(p.a);
  const T* __restrict dy = in<T>(p.dy);
  T* __restrict dx = out<T>(p.out);
  for (int64_t i = i0; i < i1; i++) dx[i] = store<T>(load(dy[i]) * gelu_slope(load(x[i])));
}

template <class T>
void swiglu_typed(const SwiGLU& p, int64_t row0, int64_t row1) {
  for (int64_t row = row0; row < row1; row++) {
    const int64_t b = row / p.T, t = row % p.T;
    const T* __restrict gate = in<T>(p.gate.data) + b * p.gate.batch + t * p.gate.row;
    const T* __restrict up = in<T>(p.up.data) + b * p.up.batch + t * p.up.row;
    T* __restrict y = out<T>(p.out.data) + b * p.out.batch + t * p.out.row;
    for (int64_t i = 0; i < p.D; i++) {
      const float x = load(gate[i]);
      y[i] = store<T>(x * sigmoid(x) * load(up[i]));
    }
  }
}

void swiglu(const SwiGLU& p, int64_t row0, int64_t row1) {
  if (p.gate.type == Type::bf16)
    swiglu_typed<bf16>(p, row0, row1);
  else
    swiglu_typed<float>(p, row0, row1);
}

template <class T>
void swiglu_backward_typed(const Elementwise& p, int64_t i0, int64_t i1) {
  const T* __restrict a = in<T>(p.a);
  const T* __restrict b = in<T>(p.b);
  const T* __restrict dy = in<T>(p.dy);
  T* __restrict da = out<T>(p.out);
  T* __restrict db = out<T>(p.out2);
  for (int64_t i = i0; i < i1; i++) {
    const float x = load(a[i]), s = sigmoid(x), g = load(dy[i]);
    da[i] = store<T>(g * load(b[i]) * s * (1.0f + x * (1.0f - s)));
    db[i] = store<T>(g * x * s);
  }
}

#define TDM_BY_TYPE(name)                                        \
  void name(const Elementwise& p, int64_t i0, int64_t i1) {      \
    if (p.type == Type::bf16)                                    \
      name##_typed<bf16>(p, i0, i1);                             \
    else                                                         \
      name##_typed<float>(p, i0, i1);                            \
  }
TDM_BY_TYPE(gelu)
TDM_BY_TYPE(gelu_backward)
TDM_BY_TYPE(swiglu_backward)
#undef TDM_BY_TYPE

// A register's worth of floats; unaligned in memory.
using Vec = float __attribute__((vector_size(TDM_LANES * 4)));
constexpr int kLanes = TDM_LANES, kMaxVecs = TDM_LANES == 16 ? 4 : 2, kQueries = 4;

inline Vec vec_at(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// c [R, NV * kLanes] = a [R, depth] b [depth, NV * kLanes] + start, all in registers; `start` is
// null, one row for all (start_row 0), or c itself.
template <int R, int NV>
inline void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                 const float* start, int64_t start_row, float* c, int64_t c_row) {
  Vec sum[R][NV] = {};
  for (int64_t d = 0; d < depth; d++) {
    Vec right[NV];
#pragma GCC unroll 8
    for (int i = 0; i < NV; i++) right[i] = vec_at(b + d * b_row + i * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float left = a[r * a_row + d];
#pragma GCC unroll 8
      for (int i = 0; i < NV; i++) sum[r][i] += left * right[i];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < NV; i++) {
      const Vec v = start ? sum[r][i] + vec_at(start + r * start_row + i * kLanes) : sum[r][i];
      std::memcpy(c + r * c_row + i * kLanes, &v, sizeof v);
    }
  }
}

// c [kQueries, width] = a b for a `width` that is a multiple of kLanes.
void product(const float* a, int64_t a_row, const float* b, int64_t width, int64_t depth, float* c) {
  int64_t x = 0;
  for (; x + kMaxVecs * kLanes <= width; x += kMaxVecs * kLanes)
    tile<kQueries, kMaxVecs>(a, a_row, b + x, width, depth, nullptr, 0, c + x, width);
  for (; x < width; x += kLanes)
    tile<kQueries, 1>(a, a_row, b + x, width, depth, nullptr, 0, c + x, width);
}

template <int R>
inline void panel_rows(const float* x, int64_t x_row, const float* panel, int64_t K,
                       const float* bias, float* out, int64_t out_row) {
  // Sums in pieces of 256: as exact as the library's, which blocks too.
  for (int64_t k = 0; k < K; k += 256)
    for (int64_t c = 0; c < kPanel; c += 2 * kLanes) {
      const float* start = k ? out + c : bias ? bias + c : nullptr;
      tile<R, 2>(x + k, x_row, panel + k * kPanel + c, kPanel, K - k < 256 ? K - k : 256, start,
                 k ? out_row : 0, out + c, out_row);
    }
}

void linear(const Linear& p, int64_t item0, int64_t item1) {
  constexpr int kRows = kLanes == 16 ? 8 : 4;
  const int64_t M = p.B * p.T, chunks = (M + kPanelRows - 1) / kPanelRows;
  float edge[kRows * kPanel], edge_bias[kPanel];
  for (int64_t item = item0; item < item1; item++) {  // chunks inside: a panel stays in the cache
    const int64_t n0 = item / chunks * kPanel, first = item % chunks * kPanelRows;
    const int64_t last = first + kPanelRows < M ? first + kPanelRows : M;
    const int64_t columns = p.N - n0 < kPanel ? p.N - n0 : kPanel;
    const float* panel = p.panels + n0 * p.K;
    const float* bias = p.bias ? p.bias + n0 : nullptr;
    if (bias && columns < kPanel) {
      for (int64_t c = 0; c < kPanel; c++) edge_bias[c] = c < columns ? bias[c] : 0.0f;
      bias = edge_bias;
    }
    for (int64_t m = first; m < last;) {
      const int64_t b = m / p.T, t = m % p.T;
      const float* x = p.x + b * p.x_batch + t * p.x_row;
      float* out = p.out + b * p.out_batch + t * p.out_row + n0;
      // Rows of two samples are not one stride apart.
      const int64_t rows = last - m < kRows || p.T - t < kRows ? 1 : kRows;
      const bool whole = columns == kPanel;
      float* target = whole ? out : edge;
      const int64_t target_row = whole ? p.out_row : kPanel;
      if (rows == kRows)
        panel_rows<kRows>(x, p.x_row, panel, p.K, bias, target, target_row);
      else
        panel_rows<1>(x, p.x_row, panel, p.K, bias, target, target_row);
      if (p.gelu)
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = 0; c < kPanel; c++)
            target[r * target_row + c] = gelu_one(target[r * target_row + c]);
      if (!whole)
        for (int64_t r = 0; r < rows; r++)
          std::memcpy(out + r * p.out_row, edge + r * kPanel, columns * sizeof(float));
      m += rows;
    }
  }
}

// One head at a time, a few queries at a time: its keys (transposed) and values are widened once.
void attention(const Attention& p, int64_t head0, int64_t head1) {
  const int64_t H = p.H;
  const int64_t most_keys = (p.S + kLanes - 1) / kLanes * kLanes;
  const int64_t out_width = (H + kLanes - 1) / kLanes * kLanes;
  std::vector<float> keys(H * most_keys), values(p.S * out_width), q(kQueries * H);
  std::vector<float> weights(kQueries * most_keys), o(kQueries * out_width);
  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t index = head0; index < head1; index++) {
    const int64_t b = index / p.N, n = index % p.N;
    const int64_t S = p.lengths ? p.lengths[b] : p.S;
    const int64_t keys_width = (S + kLanes - 1) / kLanes * kLanes;
    const Rows k = offset(p.k, n * p.k_head), v = offset(p.v, n * p.v_head);
    for (int64_t s = 0; s < S; s++) {
      read(q.data(), k, b, s, H);
      for (int64_t d = 0; d < H; d++) keys[d * keys_width + s] = q[d];
      read(values.data() + s * out_width, v, b, s, H);
    }
    for (int64_t t0 = 0; t0 < p.T; t0 += kQueries) {
      const int64_t rows = p.T - t0 < kQueries ? p.T - t0 : kQueries;
      for (int64_t r = 0; r < rows; r++)
        read(q.data() + r * H, offset(p.q, n * p.q_head), b, t0 + r, H);
      product(q.data(), H, keys.data(), keys_width, H, weights.data());
      for (int64_t r = 0; r < rows; r++) {
        float* __restrict w = weights.data() + r * keys_width;
        float top = w[0];
        for (int64_t s = 1; s < S; s++) top = w[s] > top ? w[s] : top;
        for (int64_t s = 0; s < S; s++) w[s] = exponential((w[s] - top) * scale);
        const float norm = 1.0f / total(w, S);
        for (int64_t s = 0; s < S; s++) w[s] *= norm;
      }
      product(weights.data(), keys_width, values.data(), out_width, S, o.data());
      for (int64_t r = 0; r < rows; r++)
        write(offset(p.out, n * p.out_head), b, t0 + r, o.data() + r * out_width, H);
    }
  }
}

}  // namespace

#define TDM_STRING(x) TDM_STRING_(x)
#define TDM_STRING_(x) #x

Kernels kernels() {
  return {TDM_STRING(TDM_ISA), residual_norm, residual_norm_backward, head_norm,
          head_norm_backward,  gelu,          gelu_backward,          swiglu,
          swiglu_backward,     attention,     linear};
}

}  // namespace tdm::TDM_ISA
