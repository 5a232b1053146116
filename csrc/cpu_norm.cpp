// Norms, gates and rotations of rows: `norm_modulate`, `gate_residual_norm`, `qk_norm_rope`.
#include "cpu_simd.h"

namespace tdm::TDM_ISA {

void residual_norm(const ResidualNorm& p, int64_t row0, int64_t row1) {
  const int64_t D = p.D;
  Scratch scratch(D, 3);
  for (int64_t row = row0; row < row1; row++) {
    const int64_t b = row / p.T, t = row % p.T;
    float* stats = p.stats ? p.stats + row * 3 : nullptr;
    const float* h = floats(p.x, b, t, D, scratch.row(0));
    // Of h: its sum for LayerNorm, its squares' for RMSNorm.
    const auto moment = [&](auto v) { return p.layer_norm ? v : v * v; };
    float sum = 0.0f;
    if (p.branch.data) {
      const float* x = h;
      const float* branch = floats(p.branch, b, t, D, scratch.row(1));
      const float* weight = p.branch_weight;
      const float* gate = p.gate.data ? at(p.gate, 0, b) : nullptr;
      float rstd = 1.0f;
      if (weight) rstd = 1.0f / std::sqrt(dot(branch, branch, D) / D + p.eps);
      if (weight && stats) stats[2] = rstd;
      float* to = target(p.h, b, t, scratch.row(0));
      sum = sum_of(D, [&](auto v, int64_t d) {
        using V = decltype(v);
        v = get<V>(branch + d);
        if (weight) v *= rstd * get<V>(weight + d);
        if (gate) v *= get<V>(gate + d);
        v += get<V>(x + d);
        put(to + d, v);
        return moment(v);
      });
      finish(p.h, b, t, to, D);
      h = to;
    }
    if (!p.y.data) continue;
    const bool rounded = p.branch.data && p.h.type != Type::f32;
    if (rounded) read(scratch.row(0), p.h, b, t, D);  // the norm reads h as it is stored
    if (rounded || !p.branch.data)
      sum = sum_of(D, [&](auto v, int64_t d) { return moment(get<decltype(v)>(h + d)); });
    const float mean = p.layer_norm ? sum / D : 0.0f;
    if (p.layer_norm)
      sum = sum_of(D, [&](auto v, int64_t d) {
        v = get<decltype(v)>(h + d) - mean;
        return v * v;
      });
    const float rstd = 1.0f / std::sqrt(sum / D + p.eps);
    if (stats) stats[0] = mean, stats[1] = rstd;
    for (int64_t m = 0; m < p.M; m++) {
      const Rows y = offset(p.y, m * p.y_set);
      const float* scale = p.scale.data ? at(p.scale, m, b) : nullptr;
      const float* shift = p.shift.data ? at(p.shift, m, b) : nullptr;
      float* to = target(y, b, t, scratch.row(2));
      each(D, [&](auto v, int64_t d) {
        using V = decltype(v);
        v = (get<V>(h + d) - mean) * rstd;
        if (p.weight) v *= get<V>(p.weight + d);
        if (scale) v *= get<V>(scale + d);
        if (shift) v += get<V>(shift + d);
        put(to + d, v);
      });
      finish(y, b, t, to, D);
    }
  }
}

namespace {

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

}  // namespace

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
      if (p.branch_weight || p.dgate) read(n, p.branch, b, t, D);
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

namespace {

// Lanes 2i and 2i + 1 of `v` changed places, or one of them in both.
template <int kEven, int kOdd, int... i>
inline Vec lanes(Vec v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i / 2 * 2 + (i % 2 ? kOdd : kEven))...);
}
template <int kEven, int kOdd>
inline Vec lanes(Vec v) {
  return lanes<kEven, kOdd>(v, std::make_integer_sequence<int, kLanes>());
}

inline Vec signs(float sign) {  // -sign, sign, -sign, ...
  Vec v;
  for (int i = 0; i < kLanes; i++) v[i] = i % 2 ? sign : -sign;
  return v;
}

// (a, b) -> (a cos - b sin, a sin + b cos), in place; `sign` -1 turns back.
inline void rotate(float* x, const float* turns, float sign, int64_t H) {
  const Vec flip = signs(sign);
  int64_t d = 0;
  for (; d + kLanes <= H; d += kLanes) {
    const Vec v = get<Vec>(x + d), turn = get<Vec>(turns + d);
    put(x + d, v * lanes<0, 0>(turn) + lanes<1, 0>(v) * (lanes<1, 1>(turn) * flip));
  }
  for (; d < H; d += 2) {
    const float a = x[d], b = x[d + 1], c = turns[d], s = sign * turns[d + 1];
    x[d] = a * c - b * s;
    x[d + 1] = a * s + b * c;
  }
}

}  // namespace

void head_norm(const HeadNorm& p, int64_t row0, int64_t row1) {
  const int64_t H = p.H;
  Scratch scratch(H, 1);
  for (int64_t row = row0; row < row1; row++) {
    const int64_t b = row / p.T, t = row % p.T;
    const float* turns = p.rope ? p.rope + b * p.rope_batch + t * p.rope_row : nullptr;
    for (int64_t n = 0; n < p.N; n++) {
      const Rows out = offset(p.out, n * p.out_head);
      const float* x = floats(offset(p.x, n * p.x_head), b, t, H, scratch.row(0));
      float* to = target(out, b, t, scratch.row(0));
      const float rstd = p.weight ? 1.0f / std::sqrt(dot(x, x, H) / H + p.eps) : 1.0f;
      each(H, [&](auto v, int64_t d) {
        using V = decltype(v);
        v = get<V>(x + d);
        if (p.weight) v *= rstd * get<V>(p.weight + d);
        put(to + d, v);
      });
      if (turns) rotate(to, turns, 1.0f, H);
      finish(out, b, t, to, H);
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

}  // namespace tdm::TDM_ISA
