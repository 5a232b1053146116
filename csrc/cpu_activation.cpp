// `gelu_tanh` and `swiglu`, element by element.
#include "cpu_simd.h"

namespace tdm::TDM_ISA {
namespace {

inline float gelu_slope(float x) {
  const float s = sigmoid(x * (kLinear + kCubic * x * x));
  return s + x * s * (1.0f - s) * (kLinear + 3.0f * kCubic * x * x);
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

}  // namespace

void swiglu(const SwiGLU& p, int64_t row0, int64_t row1) {
  if (p.gate.type == Type::bf16)
    swiglu_typed<bf16>(p, row0, row1);
  else
    swiglu_typed<float>(p, row0, row1);
}

namespace {

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

}  // namespace

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

}  // namespace tdm::TDM_ISA
