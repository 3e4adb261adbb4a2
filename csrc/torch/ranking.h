// SPDX-License-Identifier: BSD-3-Clause
// What the bindings of the ranking losses share.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels/ranking/ranking_pairs.h"
#include "common.h"

namespace ssmkernels::binding {

// The rows and references, contiguous, and the margins.
struct RankingTensors {
  Tensor rows, references;
  double positive_margin, negative_margin;

  RankingTensors(const Tensor& rows_in, const std::optional<Tensor>& references_in, double positive_margin,
                 double negative_margin)
      : rows(as_contiguous(rows_in)), positive_margin(positive_margin), negative_margin(negative_margin) {
    STD_TORCH_CHECK(rows.dim() == 2, "embeddings must be [n, d]");
    if (!references_in) return;
    STD_TORCH_CHECK(references_in->dim() == 2 && references_in->size(1) == rows.size(1), "references must be [m, ",
                    rows.size(1), "]");
    check_like(*references_in, "references", rows.scalar_type(), rows);
    references = as_contiguous(*references_in);
  }

  int64_t reference_count() const {
    return references.defined() ? references.size(0) : rows.size(0);
  }
  int64_t row_tiles() const {
    return (rows.size(0) + kRankingTile - 1) / kRankingTile;
  }
  int64_t reference_tiles() const {
    return (reference_count() + kRankingTile - 1) / kRankingTile;
  }

  // Products of the rows, and of as many features of a basis.
  Threads threads(int64_t basis_dim) const {
    return Threads(static_cast<double>(rows.size(0)) * reference_count() * (rows.size(1) + basis_dim));
  }

  template <class Storage>
  RankingPairs<Storage> view() const {
    static constexpr Storage none[1] =
        {};  // the memory of a tensor without elements is null, which stands for no references
    const Storage* others = !references.defined() ? nullptr : references.numel() > 0 ? data<Storage>(references) : none;
    return {data<Storage>(rows), others,          rows.size(0),   reference_count(),
            rows.size(1),        positive_margin, negative_margin};
  }
};

// Loss [], weights [2] and active tiles; these with a row and a column to spare, so that a compiler that traces any
// number of rows need not ask whether there is more than one tile.
using RankingLossTensors = std::tuple<Tensor, Tensor, Tensor>;

inline RankingLossTensors new_ranking_loss(const RankingTensors& in) {
  const ScalarType dtype = compute_dtype(in.rows);
  Tensor active = new_tensor(in.rows, {in.row_tiles() + 1, in.reference_tiles() + 1}, ScalarType::Byte);
  if (active.is_cpu())
    std::fill_n(data<uint8_t>(active), active.numel(), 0);
  else
    torch::stable::zero_(active);
  return {new_tensor(in.rows, {}, dtype), new_tensor(in.rows, {2}, dtype), active};
}

template <class Real>
RankingLoss<Real> ranking_loss_view(const RankingLossTensors& out, int64_t reduction) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction must be 0 (mean_nonzero), 1 (mean) or 2 (sum)");
  const auto& [loss, weights, active] = out;
  return {static_cast<Reduction>(reduction), data<Real>(loss), data<Real>(weights), data<uint8_t>(active)};
}

// What a backward takes from the forward, and its results; those of references are empty without any.
struct RankingGradientTensors {
  Tensor grad_loss, weights, active, rows, references;

  RankingGradientTensors(const RankingTensors& in, const Tensor& grad_loss_in, const Tensor& weights_in,
                         const Tensor& active_in)
      : grad_loss(grad_loss_in), weights(as_contiguous(weights_in)), active(as_contiguous(active_in)) {
    const ScalarType dtype = compute_dtype(in.rows);
    STD_TORCH_CHECK(grad_loss.dim() == 0, "grad_loss must be []");
    check_like(grad_loss, "grad_loss", dtype, in.rows);
    check_shape(weights, "weights", 2);
    check_like(weights, "weights", dtype, in.rows);
    check_shape(active, "active", in.row_tiles() + 1, in.reference_tiles() + 1);
    check_like(active, "active", ScalarType::Byte, in.rows);
    rows = new_tensor(in.rows, {in.rows.size(0), in.rows.size(1)}, dtype);
    references = in.references.defined() ? new_tensor(in.rows, {in.reference_count(), in.rows.size(1)}, dtype)
                                         : new_tensor(in.rows, {0}, dtype);
    if (rows.is_cpu()) return;  // there every row is written, see check_label_order
    torch::stable::zero_(rows);
    torch::stable::zero_(references);
  }

  template <class Real>
  RankingGradients<Real> view() const {
    return {data<Real>(grad_loss), data<Real>(weights), data<uint8_t>(active), data<Real>(rows),
            data<Real>(references)};
  }
};

// Runs cpu(pairs) with rows of float32 or float64, or cuda(pairs, workspace, stream) with rows of any dtype.
template <class Cpu, class Cuda>
void run_ranking(const RankingTensors& in, const char* op, int64_t basis_dim, bool backward, const Cpu& cpu,
                 const Cuda& cuda_call) {
  dispatch_dtype(in.rows, [&](auto storage) {
    using Storage = decltype(storage);
    const RankingPairs<Storage> pairs = in.view<Storage>();
    run_on_device(
        in.rows, op,
        [&] {
          if constexpr (std::is_same_v<Storage, Compute<Storage>>)
            cpu(pairs);
          else
            STD_TORCH_CHECK(false, op, ": half types are float32 on the CPU");
        },
        [&](CudaStream stream) -> const char* {
          if constexpr (kWithCuda) {
            const Tensor workspace =
                new_tensor(in.rows, {cuda::ranking_workspace(pairs, basis_dim, backward)}, ScalarType::Byte);
            return cuda_call(pairs, data<void>(workspace), stream);
          } else {
            return nullptr;
          }
        });
  });
}

// Rows in the order of their labels: order [n], a permutation, and labels [n] (ascending). A row's place outside [0, n)
// would be read out of bounds, and the gradient of a row that has none would stay unwritten; on CUDA, where looking at
// them would synchronise, the kernels look themselves, and gradients start as zeros.
inline void check_label_order(const Tensor& order, const Tensor& labels, const char* name, const Tensor& rows) {
  const int64_t count = rows.size(0);
  check_shape(order, name, count);
  check_like(order, name, ScalarType::Long, rows);
  check_shape(labels, "labels", count);
  check_like(labels, "labels", ScalarType::Long, rows);
  if (!rows.is_cpu()) return;
  const Tensor contiguous = as_contiguous(order);
  const int64_t* places = data<int64_t>(contiguous);
  std::vector<bool> seen(count);
  for (int64_t k = 0; k < count; ++k) {
    STD_TORCH_CHECK(places[k] >= 0 && places[k] < count && !seen[places[k]], name, " must be a permutation of [0, ",
                    count, ")");
    seen[places[k]] = true;
  }
}

}  // namespace ssmkernels::binding
