// csrc's schemas and its ops for CUDA, as ops for CPU tensors in a namespace of their own. The torch
// headers come first: the renaming is for our sources alone.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define CUDA CPU
#define tdm_kernels tdm_emulated
#define TDM_CUDA_ARCHITECTURES "emulated"

#include "../../../csrc/cuda_ops.cpp"
#include "../../../csrc/ops.cpp"

// A CPU has no device to make current, and no stream. The linker is told to prefer these.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}
