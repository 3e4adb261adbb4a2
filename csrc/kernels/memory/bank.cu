// SPDX-License-Identifier: BSD-3-Clause
#include "../common/class_order.cuh"
#include "bank.h"

namespace ssmkernels::cuda {

int64_t kept_class_order_bytes(int64_t slots, int64_t classes) {
  return kept_order_bytes({nullptr, slots, classes});
}

void* allocate_class_order(int64_t bytes, CudaStream stream) {
  void* memory = nullptr;
  if (message(cudaMallocAsync(&memory, bytes, stream))) return nullptr;
  if (!message(cudaMemsetAsync(memory, 0, bytes, stream))) return memory;
  free_class_order(memory, stream);
  return nullptr;
}

void free_class_order(void* memory, CudaStream stream) {
  message(cudaFreeAsync(memory, stream));
}

bool is_capturing(CudaStream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return message(cudaStreamIsCapturing(stream, &status)) || status != cudaStreamCaptureStatusNone;
}

}  // namespace ssmkernels::cuda
