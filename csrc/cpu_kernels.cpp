// The table of one instruction set.
#include "cpu_simd.h"

namespace tdm::TDM_ISA {

#define TDM_STRING(x) TDM_STRING_(x)
#define TDM_STRING_(x) #x

Kernels kernels() {
  return {TDM_STRING(TDM_ISA), residual_norm, residual_norm_backward, head_norm,
          head_norm_backward,  gelu,          gelu_backward,          swiglu,
          swiglu_backward,     attention,     attention_backward,     linear,
          group_affine,        conv};
}

}  // namespace tdm::TDM_ISA
