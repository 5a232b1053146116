// Sums of products: `linear` over packed panels, and `joint_attention`.
#include "cpu_simd.h"

namespace tdm::TDM_ISA {
namespace {

constexpr int kMaxVecs = kLanes == 16 ? 4 : 2, kQueries = 4;

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

}  // namespace

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

}  // namespace tdm::TDM_ISA
