// `joint_attention` and its gradients, head by head.
#include "cpu_simd.h"

namespace tdm::TDM_ISA {
namespace {

constexpr int kRows = kLanes == 16 ? 8 : 4;  // of a product at once

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The rows of one head as floats, `row` apart.
struct Head {
  const float* data;
  int64_t row;
};

// In place where they are floats, whole registers wide and `unit` divides T; else in `buffer`
// [T, width], whose further columns are zeros.
Head head_of(const Rows& rows, int64_t b, int64_t T, int64_t H, float* buffer, int64_t unit = 1) {
  if (rows.type == Type::f32 && H % kLanes == 0 && T % unit == 0)
    return {at<const float>(rows, b, 0), rows.row};
  const int64_t width = round_up(H, kLanes);
  for (int64_t t = 0; t < T; t++) read(buffer + t * width, rows, b, t, H);
  return {buffer, width};
}

using Four = float __attribute__((vector_size(16)));

// out [4, 4] <- in [4, 4], turned.
inline void turn_four(const float* in, int64_t in_row, float* out, int64_t out_row) {
  const Four a = get<Four>(in), b = get<Four>(in + in_row);
  const Four c = get<Four>(in + 2 * in_row), d = get<Four>(in + 3 * in_row);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  put(out, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  put(out + out_row, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  put(out + 2 * out_row, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
  put(out + 3 * out_row, __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
}

// out [H, width] <- the head's [T, H], turned.
void turn(const Head& head, int64_t T, int64_t H, float* __restrict out, int64_t width) {
  const int64_t fours = H / 4 * 4;
  for (int64_t t = 0; t < T; t++) {
    const float* in = head.data + t * head.row;
    int64_t d = 0;
    if (t % 4 == 0 && t + 4 <= T)
      for (; d < fours; d += 4) turn_four(in + d, head.row, out + d * width + t, width);
    else if (t < T / 4 * 4)
      d = fours;  // turned with the rows before
    for (; d < H; d++) out[d * width + t] = in[d];
  }
}

// c [kRows, width] = a b for a `width` that is a multiple of kLanes; a [kRows, depth] has any strides.
void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
             int64_t width, int64_t depth, float* c, int64_t c_row) {
  int64_t x = 0;
  for (; x + 2 * kLanes <= width; x += 2 * kLanes)
    tile<kRows, 2>(a, a_row, b + x, b_row, depth, nullptr, 0, c + x, c_row, a_step);
  if (x < width) tile<kRows, 1>(a, a_row, b + x, b_row, depth, nullptr, 0, c + x, c_row, a_step);
}

// Rows t .. t + kRows - 1 of `to`, those that are there (below T), as a [kRows, depth] times the head.
void product_rows(const float* a, int64_t a_row, int64_t a_step, const Head& head, int64_t depth,
                  const Rows& to, int64_t b, int64_t t, int64_t T, int64_t H, float* scratch) {
  const int64_t width = round_up(H, kLanes);
  if (to.type == Type::f32 && width == H && t + kRows <= T)
    return product(a, a_row, a_step, head.data, head.row, width, depth, at<float>(to, b, t), to.row);
  product(a, a_row, a_step, head.data, head.row, width, depth, scratch, width);
  for (int64_t r = 0; r < kRows && t + r < T; r++) write(to, b, t + r, scratch + r * width, H);
}

// w [S] <- softmax(w * scale). It lies in `width` floats, a multiple of kLanes; the rest is spoilt.
void softmax(float* __restrict w, int64_t S, int64_t width, float scale) {
  for (int64_t s = S; s < width; s++) w[s] = w[0];
  const float top = largest(w, width);
  for (int64_t s = 0; s < width; s++) w[s] = exponential((w[s] - top) * scale);
  const float norm = 1.0f / total(w, S);
  for (int64_t s = 0; s < S; s++) w[s] *= norm;
}

}  // namespace

void attention(const Attention& p, int64_t head0, int64_t head1) {
  const int64_t H = p.H, T = p.T, width = round_up(H, kLanes), all = round_up(T, kRows);
  const int64_t most_keys = round_up(p.S, kLanes);
  std::vector<float> keys(p.S * width), turned(H * most_keys), values(p.S * width);
  std::vector<float> queries(all * width), weights(kRows * most_keys), row(kRows * width);
  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t index = head0; index < head1; index++) {
    const int64_t b = index / p.N, n = index % p.N;
    const int64_t S = p.lengths ? p.lengths[b] : p.S, keys_width = round_up(S, kLanes);
    const Head q = head_of(offset(p.q, n * p.q_head), b, T, H, queries.data(), kRows);
    const Head v = head_of(offset(p.v, n * p.v_head), b, S, H, values.data());
    turn(head_of(offset(p.k, n * p.k_head), b, S, H, keys.data()), S, H, turned.data(), keys_width);
    for (int64_t t = 0; t < T; t += kRows) {
      product(q.data + t * q.row, q.row, 1, turned.data(), keys_width, keys_width, H,
              weights.data(), keys_width);
      for (int64_t r = 0; r < kRows && t + r < T; r++)
        softmax(weights.data() + r * keys_width, S, keys_width, scale);
      product_rows(weights.data(), keys_width, 1, v, S, offset(p.out, n * p.out_head), b, t, T, H,
                   row.data());
    }
  }
}

// With P = softmax(q k^T / sqrt(H)): dP = dout v^T, dS = P (dP - sum_s P dP) / sqrt(H),
// dq = dS k, dk = dS^T q, dv = P^T dout. P and dS of a whole head are kept.
void attention_backward(const Attention& p, int64_t head0, int64_t head1) {
  const int64_t H = p.H, T = p.T, width = round_up(H, kLanes), all = round_up(T, kRows);
  const int64_t most_keys = round_up(p.S, kLanes);
  std::vector<float> keys(p.S * width), keys_turned(H * most_keys);
  std::vector<float> values(p.S * width), values_turned(H * most_keys);
  std::vector<float> queries(all * width), outputs(all * width), row(kRows * width);
  std::vector<float> weights(all * most_keys), slopes(all * most_keys);
  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t index = head0; index < head1; index++) {
    const int64_t b = index / p.N, n = index % p.N;
    const int64_t S = p.lengths ? p.lengths[b] : p.S, keys_width = round_up(S, kLanes);
    const Rows dq = offset(p.dq, n * p.dq_head);
    const Rows dk = offset(p.dk, n * p.dk_head), dv = offset(p.dv, n * p.dv_head);
    const Head q = head_of(offset(p.q, n * p.q_head), b, T, H, queries.data(), kRows);
    const Head dout = head_of(offset(p.out, n * p.out_head), b, T, H, outputs.data(), kRows);
    const Head k = head_of(offset(p.k, n * p.k_head), b, S, H, keys.data());
    const Head v = head_of(offset(p.v, n * p.v_head), b, S, H, values.data());
    turn(k, S, H, keys_turned.data(), keys_width);
    turn(v, S, H, values_turned.data(), keys_width);
    for (int64_t t = 0; t < T; t += kRows) {
      float* weight = weights.data() + t * keys_width;
      float* slope = slopes.data() + t * keys_width;
      product(q.data + t * q.row, q.row, 1, keys_turned.data(), keys_width, keys_width, H, weight,
              keys_width);
      product(dout.data + t * dout.row, dout.row, 1, values_turned.data(), keys_width, keys_width,
              H, slope, keys_width);
      for (int64_t r = 0; r < kRows && t + r < T; r++) {
        float* __restrict w = weight + r * keys_width;
        float* __restrict s = slope + r * keys_width;
        softmax(w, S, keys_width, scale);
        const float mean = dot(w, s, S);
        for (int64_t i = 0; i < S; i++) s[i] = w[i] * (s[i] - mean) * scale;
      }
      product_rows(slope, keys_width, 1, k, S, dq, b, t, T, H, row.data());
    }
    for (int64_t s = 0; s < S; s += kRows) {
      product_rows(slopes.data() + s, 1, keys_width, q, T, dk, b, s, S, H, row.data());
      product_rows(weights.data() + s, 1, keys_width, dout, T, dv, b, s, S, H, row.data());
    }
    std::fill(row.begin(), row.end(), 0.0f);
    for (int64_t s = S; s < p.S; s++) {  // keys beyond a length
      write(dk, b, s, row.data(), H);
      write(dv, b, s, row.data(), H);
    }
  }
}

}  // namespace tdm::TDM_ISA
