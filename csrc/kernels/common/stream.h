// SPDX-License-Identifier: BSD-3-Clause
#pragma once

struct CUstream_st;

namespace ssmkernels {

using CudaStream = CUstream_st*;  // cudaStream_t, without its header

}  // namespace ssmkernels
