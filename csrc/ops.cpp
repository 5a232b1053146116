// Schemas only. Every op writes into tensors its caller allocated, so that nothing here allocates;
// kernels/tdm_kernels/native.py is that caller, and reference.py says what each op computes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tdm_kernels, m) {
  m.def(
      "residual_norm(Tensor x, Tensor? branch, Tensor? gate, Tensor? branch_weight, "
      "Tensor? weight, Tensor? scale, Tensor? shift, float eps, Tensor(a!)? h, Tensor(b!)? y, "
      "Tensor(c!)? stats) -> ()");
  m.def(
      "residual_norm_backward(Tensor? dh, Tensor? dy, Tensor h, Tensor? branch, Tensor? gate, "
      "Tensor? branch_weight, Tensor? weight, Tensor? scale, Tensor stats, Tensor(a!)? dx, "
      "Tensor(b!)? dbranch, Tensor(c!)? dgate, Tensor(d!)? dbranch_weight, Tensor(e!)? dweight, "
      "Tensor(f!)? dscale, Tensor(g!)? dshift) -> ()");
  m.def(
      "head_norm(Tensor x, Tensor? weight, Tensor? rope, float eps, Tensor(a!) out) -> ()");
  m.def(
      "qk_norm(Tensor q, Tensor k, Tensor? weight_q, Tensor? weight_k, int tail, Tensor? tail_q, "
      "Tensor? tail_k, Tensor? rope, float eps, Tensor(a!) out_q, Tensor(b!) out_k) -> ()");
  m.def(
      "head_norm_backward(Tensor dout, Tensor x, Tensor? weight, Tensor? rope, float eps, "
      "Tensor(a!) dx, Tensor(b!)? dweight) -> ()");
  m.def(
      "head_norms(Tensor q, Tensor? k, Tensor? weight_q, Tensor? weight_k, Tensor? rope, "
      "float eps, Tensor(a!) out_q, Tensor(b!)? out_k) -> ()");
  m.def("gelu(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_backward(Tensor dy, Tensor x, Tensor(a!) dx) -> ()");
  m.def("swiglu(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def(
      "swiglu_backward(Tensor dy, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor(a!) out) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? lengths, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def("pack_panels(Tensor weight, Tensor(a!) panels) -> ()");
  m.def("linear(Tensor x, Tensor panels, Tensor? bias, int N, bool gelu, Tensor(a!) out) -> ()");
  m.def(
      "group_affine(Tensor x, Tensor weight, Tensor bias, int groups, float eps, "
      "Tensor(a!) scale, Tensor(b!) shift) -> ()");
  m.def(
      "conv(Tensor x, Tensor? scale, Tensor? shift, Tensor panels, Tensor? bias, "
      "Tensor? residual, int kernel, bool upsample, Tensor(a!) out) -> ()");
  m.def("record() -> ()");
  m.def("recorded() -> int");
  m.def("replay(int program, int threads) -> ()");
  m.def("forget(int program) -> ()");
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> ()");
  m.def("cuda_architectures() -> str");
}
