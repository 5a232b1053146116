// Convolutions of images, channels last, with the GroupNorm and SiLU before them: `pack_conv`.
#include "cpu_simd.h"

namespace tdm::TDM_ISA {

void group_affine(const GroupAffine& p, int64_t b0, int64_t b1) {
  const int64_t C = p.C, width = C / p.groups;
  const double count = double(p.P * width);
  std::vector<float> row_sum(C);
  std::vector<double> sum(C);
  // Sums within 64 pixels in fp32, of those in fp64.
  const auto sums = [&](const float* x, auto term) {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t p0 = 0; p0 < p.P; p0 += 64) {
      std::fill(row_sum.begin(), row_sum.end(), 0.0f);
      for (int64_t i = p0; i < p.P && i < p0 + 64; i++)
        each(C, [&](auto v, int64_t c) {
          using V = decltype(v);
          put(row_sum.data() + c, get<V>(row_sum.data() + c) + term(get<V>(x + i * C + c), c));
        });
      for (int64_t c = 0; c < C; c++) sum[c] += double(row_sum[c]);
    }
  };
  const auto group_mean = [&](int64_t g) {
    double all = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; c++) all += sum[c];
    return float(all / count);
  };
  std::vector<float> mean(C);
  for (int64_t b = b0; b < b1; b++) {
    const float* x = p.x + b * p.P * C;
    sums(x, [](auto v, int64_t) { return v; });
    for (int64_t c = 0; c < C; c++) mean[c] = group_mean(c / width);
    sums(x, [&](auto v, int64_t c) {
      v -= get<decltype(v)>(mean.data() + c);
      return v * v;
    });
    for (int64_t c = 0; c < C; c++) {
      const float scale = p.weight[c] / std::sqrt(group_mean(c / width) + p.eps);
      p.scale[b * C + c] = scale;
      p.shift[b * C + c] = p.bias[c] - mean[c] * scale;
    }
  }
}

namespace {

constexpr int kWide = int(kConvPanel) / kLanes;        // registers of one row of a panel
constexpr int kPixels = kLanes == 16 ? 16 : kLanes == 8 ? 4 : 2;  // outputs in registers at once

// out [R, kConvPanel] = bias + sum over `taps` rows of a[tap] [R, depth] b[tap] [depth, kConvPanel];
// neighbouring pixels overlap: row r of a[tap] begins at a[tap] + r C. Each tap is summed on its own:
// as exact as the library's, which sums in pieces too.
template <int R>
inline void pixels(const float* const* a, int taps, int64_t C, const float* b, const float* bias,
                   float* out, int64_t out_pixel) {
  const int64_t depth = taps * C;
  for (int i = 0; i < taps; i++)
    tile<R, kWide>(a[i], C, b + i * depth * kConvPanel, kConvPanel, depth, i ? out : bias,
                   i ? out_pixel : 0, out, out_pixel);
}

// The last `columns` of a panel that is not whole: computed beside, then copied.
template <int R>
inline void edge_pixels(const float* const* a, int taps, int64_t C, const float* b,
                        const float* bias, float* out, int64_t out_pixel, int64_t columns) {
  float whole[R * kConvPanel];
  pixels<R>(a, taps, C, b, bias, whole, kConvPanel);
  for (int r = 0; r < R; r++)
    std::memcpy(out + r * out_pixel, whole + r * kConvPanel, columns * sizeof(float));
}

// One row of W outputs, `out_pixel` floats apart, from `taps` rows of input.
void output_row(const Conv& p, const float* const* rows, int taps, const float* panels, float* out,
                int64_t out_pixel) {
  const int64_t panel = taps * taps * p.C * kConvPanel;
  for (int64_t n0 = 0; n0 < p.O; n0 += kConvPanel, panels += panel) {
    const int64_t columns = p.O - n0 < kConvPanel ? p.O - n0 : kConvPanel;
    float bias[kConvPanel] = {};
    for (int64_t c = 0; p.bias && c < columns; c++) bias[c] = p.bias[n0 + c];
    for (int64_t x = 0; x < p.W;) {
      const float* a[3];
      for (int i = 0; i < taps; i++) a[i] = rows[i] + x * p.C;
      float* to = out + x * out_pixel + n0;
      const bool whole = columns == kConvPanel;
      const auto run = [&](auto count) {
        constexpr int R = decltype(count)::value;
        if (whole)
          pixels<R>(a, taps, p.C, panels, bias, to, out_pixel);
        else
          edge_pixels<R>(a, taps, p.C, panels, bias, to, out_pixel, columns);
        x += R;
      };
      if (p.W - x >= kPixels)
        run(std::integral_constant<int, kPixels>());
      else if (p.W - x >= kPixels / 2)
        run(std::integral_constant<int, kPixels / 2>());
      else
        run(std::integral_constant<int, 1>());
    }
  }
}

// The last three rows of input that were asked for, one zero pixel at either end of each, after
// GroupNorm and SiLU.
class InputRows {
 public:
  explicit InputRows(const Conv& p) : p_(p), size_((p.W + 2) * p.C), data_(3 * size_) {}

  // The first pixel after the zeros; y from -1 to H.
  const float* row(int64_t b, int64_t y) {
    const int slot = int((y + 3) % 3);
    float* to = data_.data() + slot * size_ + p_.C;
    const int64_t wanted = b * (p_.H + 2) + y + 1;
    if (held_[slot] != wanted) fill(to, b, y), held_[slot] = wanted;
    return to;
  }

 private:
  void fill(float* to, int64_t b, int64_t y) const {
    const int64_t n = p_.W * p_.C;
    if (y < 0 || y >= p_.H) {
      std::memset(to, 0, n * sizeof(float));
      return;
    }
    const float* x = p_.x + (b * p_.H + y) * n;
    if (!p_.scale) {
      std::memcpy(to, x, n * sizeof(float));
      return;
    }
    const float* scale = p_.scale + b * p_.C;
    const float* shift = p_.shift + b * p_.C;
    for (int64_t i = 0; i < n; i += p_.C)
      for (int64_t c = 0; c < p_.C; c++) {
        const float v = x[i + c] * scale[c] + shift[c];
        to[i + c] = v * sigmoid(v);
      }
  }

  const Conv& p_;
  const int64_t size_;
  std::vector<float> data_;
  int64_t held_[3] = {-1, -1, -1};
};

}  // namespace

void conv(const Conv& p, int64_t row0, int64_t row1) {
  InputRows input(p);
  const int64_t wide = p.upsample ? 2 * p.W : p.W;
  const int64_t panels = (p.O + kConvPanel - 1) / kConvPanel;
  for (int64_t row = row0; row < row1; row++) {
    const int64_t b = row / p.H, y = row % p.H;
    float* out = p.out + row * (p.upsample ? 2 : 1) * wide * p.O;
    if (p.kernel == 1) {
      const float* rows[] = {input.row(b, y)};
      output_row(p, rows, 1, p.panels, out, p.O);
    } else {
      const float* rows[] = {input.row(b, y - 1) - p.C, input.row(b, y) - p.C,
                             input.row(b, y + 1) - p.C};
      if (!p.upsample) {
        output_row(p, rows, 3, p.panels, out, p.O);
      } else {  // four images of every other pixel, each by a 2 x 2 kernel of its own
        const int64_t size = panels * kConvPanel * 4 * p.C;
        for (int dy = 0; dy < 2; dy++)
          for (int dx = 0; dx < 2; dx++) {
            const float* pair[] = {rows[dy] + dx * p.C, rows[dy + 1] + dx * p.C};
            output_row(p, pair, 2, p.panels + (2 * dy + dx) * size, out + (dy * wide + dx) * p.O,
                       2 * p.O);
          }
      }
    }
    if (!p.residual) continue;
    const int64_t n = (p.upsample ? 2 : 1) * wide * p.O;
    const float* residual = p.residual + row * n;
    each(n, [&](auto v, int64_t i) {
      using V = decltype(v);
      put(out + i, get<V>(out + i) + get<V>(residual + i));
    });
  }
}

}  // namespace tdm::TDM_ISA
