// SPDX-License-Identifier: BSD-3-Clause
#include "../common/class_order.cuh"
#include "bank.h"

namespace ssmkernels::cuda {

int64_t kept_class_order_bytes(int64_t slots, int64_t classes) {
  return kept_order_bytes({nullptr, slots, classes});
}

const char* clear_class_order(void* memory, int64_t bytes, CudaStream stream) {
  return message(cudaMemsetAsync(memory, 0, bytes, stream));
}

bool is_capturing(CudaStream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return message(cudaStreamIsCapturing(stream, &status)) || status != cudaStreamCaptureStatusNone;
}

}  // namespace ssmkernels::cuda
