// SPDX-License-Identifier: BSD-3-Clause
// What every binding needs: checks, dtype dispatch, threads, streams. Users meet the checks of ssmkernels/ops first,
// which raise ValueError and TypeError; those here keep a direct call of torch.ops.ssmkernels from reading out of
// bounds.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <tuple>
#include <type_traits>

#include "../kernels/common/dtype.h"
#include "../kernels/common/isa.h"
#include "../kernels/common/stream.h"
#include "threads.h"

// Newer than the oldest torch that is supported, 2.11. Its headers have this one, which does without the message of
// torch's own error.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// Lives in libtorch_cuda: present under a CUDA build of torch, null under a CPU one, so that one binary loads under
// both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace ssmkernels::binding {

inline constexpr bool kWithCuda = SSM_WITH_CUDA;

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType compute_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_shape(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must be [", rows,
                  ", ", columns, "]");
}

inline void check_shape(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must be [", size, "]");
}

inline void check_like(const Tensor& tensor, const char* name, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " is on another device");
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline constexpr size_t kMaxDims = 2;  // of the tensors that the ops make

// A contiguous tensor on the device of `like`. torch::stable::new_empty would look the op up by name and box its
// arguments, which takes longer than to allocate a small tensor.
inline Tensor new_tensor(const Tensor& like, Sizes size, ScalarType dtype) {
  STD_TORCH_CHECK(size.size() <= kMaxDims, "at most ", kMaxDims, " dimensions");
  int64_t strides[kMaxDims], stride = 1;
  for (size_t dim = size.size(); dim-- > 0;) {
    strides[dim] = stride;
    STD_TORCH_CHECK(!__builtin_mul_overflow(stride, size[dim] > 0 ? size[dim] : 1, &stride),
                    "a result has too many elements");
  }
  int32_t device_type, device_index;
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), strides, code,
                                                         device_type, device_index, &tensor));
  return Tensor(tensor);
}

// The tensor itself where it is contiguous already, as nearly always.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls f(Storage{}) with the storage type of the tensor. The only dtype dispatch there is.
template <class F>
void dispatch_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

// Runs cpu() or, on the tensor's device and the current stream, cuda(stream), which returns an error message or null.
// Of a build without CUDA nothing that cuda() names has to exist: what it does stands under `if constexpr (kWithCuda)`.
template <class Cpu, class Cuda>
void run_on_device(const Tensor& tensor, const char* op, const Cpu& cpu, const Cuda& cuda) {
  if (tensor.is_cpu()) return cpu();
  if constexpr (kWithCuda) {
    STD_TORCH_CHECK(tensor.is_cuda() && aoti_torch_get_current_cuda_stream, op, ": this torch has no CUDA");
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    void* stream = nullptr;
    const auto status = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
    STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, op, ": no current CUDA stream");
    const char* error = cuda(static_cast<CudaStream>(stream));
    STD_TORCH_CHECK(!error, op, ": ", error);
  } else {
    STD_TORCH_CHECK(false, op, ": ssmkernels was built without CUDA");
  }
}

}  // namespace ssmkernels::binding

#define SSM_REGISTER_FOR(device, name, function)           \
  STABLE_TORCH_LIBRARY_IMPL(ssmkernels, device, library) { \
    library.impl(name, TORCH_BOX(&function));              \
  }
#if SSM_WITH_CUDA
#define SSM_REGISTER(name, function)    \
  SSM_REGISTER_FOR(CPU, name, function) \
  SSM_REGISTER_FOR(CUDA, name, function)
#else
#define SSM_REGISTER(name, function) SSM_REGISTER_FOR(CPU, name, function)
#endif
