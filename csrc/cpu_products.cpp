// `linear` over packed panels.
#include "cpu_simd.h"

namespace tdm::TDM_ISA {
namespace {

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

}  // namespace tdm::TDM_ISA
