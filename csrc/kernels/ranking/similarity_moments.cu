// SPDX-License-Identifier: BSD-3-Clause
// All of it in float64: a variance of cosines near 1 is what float32 rounds away, and the rows are few or the sums
// short.
//
// Positives lie in the tiles of pairs around the diagonal where labels overlap. With n ≤ d the negatives are taken from
// tiles too, all of them; else from the Gram matrix: all pairs, less (i, i), less the positives.
#include "gradient.cuh"
#include "gram.cuh"
#include "pack.cuh"
#include "similarity_moments.h"

namespace ssmkernels::cuda {
namespace {

using namespace ranking;
using Engine = PlainEngine<double>;
using Rows = PackedRows<double>;

constexpr int64_t kMomentBlocks = 512, kMostMomentParts = 16, kCountBlocks = 256;
constexpr int kReduceThreads = 256, kReduceWarps = kReduceThreads / 32;

struct Moments {
  double count = 0, mean = 0, squares = 0;  // Σ (s − mean)²
};

__device__ Moments merged(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return a;
  const double apart = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

template <int kWarps>
__device__ Moments block_merged(Moments mine, Moments* scratch) {
  for (int lane = 16; lane > 0; lane /= 2)
    mine = merged(mine, {__shfl_xor_sync(kAllLanes, mine.count, lane), __shfl_xor_sync(kAllLanes, mine.mean, lane),
                         __shfl_xor_sync(kAllLanes, mine.squares, lane)});
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = mine;
  __syncthreads();
  Moments all = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) all = merged(all, scratch[warp]);
  return all;
}

// Sums about the first value.
struct Running {
  double count = 0, shift = 0, sum = 0, squares = 0;

  __device__ void add(double x) {
    if (count == 0) shift = x;
    const double apart = x - shift;
    count += 1;
    sum += apart;
    squares += apart * apart;
  }
  __device__ Moments moments() const {
    if (count == 0) return {};
    const double mean = sum / count;
    return {count, shift + mean, squares - sum * mean};
  }
};

struct PairMoments {
  Moments positive, negative;
};

struct MomentInput {
  Rows rows;  // unit rows, by label
  const int64_t* labels;
  bool all;  // negatives too
  int64_t parts;
  PairMoments* out;  // [row tiles · parts]
};

// A block has every parts-th tile right of the diagonal.
__global__ void __launch_bounds__(kTileThreads) sweep_moments(const __grid_constant__ MomentInput in) {
  using Products = Engine::Products;
  SSM_SHARED(scratch, Moments[kTileWarps]);
  double* ring = reinterpret_cast<double*>(dynamic_shared());
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x / in.parts * kSide, count = in.rows.count;
  const int64_t last_label = in.labels[min(row + kSide, count) - 1];
  Running positive, negative;
  for (int64_t column = row + blockIdx.x % in.parts * kSide; column < count; column += in.parts * kSide) {
    if (!in.all && in.labels[column] > last_label) break;
    Products products;
    multiply_pairs<Engine>(products, in.rows, row, in.rows, column, ring);
    const WarpTile tile = WarpTile::of_block(row, column);
    if (tile.row > tile.column) continue;
#pragma unroll
    for (int c = 0; c < Products::kColumns; ++c) {
      const int64_t j = tile.column + Products::column(lane, c);
      const int64_t label = in.labels[min(j, count - 1)];
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r) {
        const int64_t i = tile.row + Products::row(lane, r);
        if (i >= j || j >= count) continue;
        if (in.labels[i] == label)
          positive.add(products.at(r, c));
        else if (in.all)
          negative.add(products.at(r, c));
      }
    }
  }
  const PairMoments out{block_merged<kTileWarps>(positive.moments(), scratch),
                        block_merged<kTileWarps>(negative.moments(), scratch)};
  if (threadIdx.x == 0) in.out[blockIdx.x] = out;
}

template <class Real>
__global__ void __launch_bounds__(kReduceThreads)
    finish_moments(const PairMoments* parts, int64_t blocks, const __grid_constant__ Gram gram, int64_t row_blocks,
                   Real* out) {
  SSM_SHARED(scratch, Moments[kReduceWarps]);
  SSM_SHARED(sums, double[kReduceWarps]);
  PairMoments all;
  for (int64_t i = threadIdx.x; i < blocks; i += kReduceThreads)
    all = {merged(all.positive, parts[i].positive), merged(all.negative, parts[i].negative)};
  all = {block_merged<kReduceWarps>(all.positive, scratch), block_merged<kReduceWarps>(all.negative, scratch)};
  if (row_blocks > 0) {  // from the Gram matrix; ordered pairs
    RowSums rows{};
    double norm = 0;
    for (int64_t i = threadIdx.x; i < row_blocks; i += kReduceThreads) {
      rows.projections += gram.row_sums[i].projections;
      rows.diagonal += gram.row_sums[i].diagonal;
      rows.diagonal2 += gram.row_sums[i].diagonal2;
    }
    for (int64_t i = threadIdx.x; i < gram.dim; i += kReduceThreads) norm += gram.h.scales[i];
    rows.projections = block_sum<kReduceWarps>(rows.projections, sums);
    rows.diagonal = block_sum<kReduceWarps>(rows.diagonal, sums);
    rows.diagonal2 = block_sum<kReduceWarps>(rows.diagonal2, sums);
    norm = block_sum<kReduceWarps>(norm, sums);
    const double n = static_cast<double>(gram.rows.count), mean_norm = *gram.mean_norm;
    const double positives = 2 * all.positive.count, negatives = n * (n - 1) - positives;
    const double apart = all.positive.mean - mean_norm;
    if (negatives > 0) {
      const double mean = -(rows.diagonal + positives * apart) / negatives;  // of s − |c|²
      const double squares = 2 * n * rows.projections + norm - rows.diagonal2 -
                             (2 * all.positive.squares + positives * apart * apart) - negatives * mean * mean;
      all.negative = {negatives, mean_norm + mean, squares < 0 ? 0 : squares};
    }
  }
  if (threadIdx.x > 0) return;
  const Moments* kinds[2] = {&all.positive, &all.negative};
  for (int kind = 0; kind < 2; ++kind) {
    out[2 * kind] = static_cast<Real>(kinds[kind]->mean);
    out[2 * kind + 1] = static_cast<Real>(kinds[kind]->count > 0 ? kinds[kind]->squares / kinds[kind]->count : 0);
  }
}

// ---- the gradients: ∂L/∂r_i = 2 Σ_{j≠i} (α + β s_ij) r_j

// Positives, i < j, of a block of rows.
__global__ void __launch_bounds__(kReduceThreads) count_positives(const int64_t* labels, int64_t count, int64_t* out) {
  SSM_SHARED(scratch, int64_t[kReduceWarps]);
  int64_t before = 0;
  for (int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kReduceThreads) {
    int64_t low = 0, high = i;  // the first row of this label
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (labels[middle] < labels[i])
        low = middle + 1;
      else
        high = middle;
    }
    before += i - low;
  }
  before = block_sum<kReduceWarps>(before, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = before;
}

// α + β s
struct GradSimilarity {
  double alpha, beta;
};

struct GradSimilarities {
  GradSimilarity positive, negative;
};

template <class Real>
__global__ void __launch_bounds__(kReduceThreads)
    find_grad_similarities(const int64_t* counts, int64_t blocks, int64_t count, const Real* moments,
                           const Real* grad_moments, GradSimilarities* out) {
  SSM_SHARED(scratch, int64_t[kReduceWarps]);
  const int64_t half = block_sum<kReduceWarps>(threadIdx.x < blocks ? counts[threadIdx.x] : int64_t{0}, scratch);
  if (threadIdx.x > 0) return;
  const double positives = 2.0 * static_cast<double>(half);
  const double negatives = static_cast<double>(count) * static_cast<double>(count - 1) - positives;
  const auto grad_similarity = [&](int at, double pairs) -> GradSimilarity {
    if (pairs == 0) return {0, 0};
    const double beta = 2 * static_cast<double>(grad_moments[at + 1]) / pairs;
    return {grad_moments[at] / pairs - beta * moments[at], beta};
  };
  *out = {grad_similarity(0, positives), grad_similarity(2, negatives)};
}

// With `gram`, what positives weigh more than negatives.
struct MomentWeights {
  using Engine = PlainEngine<double>;
  static constexpr bool kMayBeClose = false;

  Rows columns;
  const int64_t* labels;
  const GradSimilarities* grad_similarities;
  bool gram;

  __device__ bool active(int64_t row, int64_t column) const {
    const int64_t i = row * kWarpSide, j = column * kWarpSide, count = columns.count;
    if (i >= count || j >= count) return false;
    if (!gram) return true;
    return labels[i] <= labels[min(j + kWarpSide, count) - 1] && labels[j] <= labels[min(i + kWarpSide, count) - 1];
  }

  __device__ bool weigh(Engine::Products& products, const WarpTile& tile, bool, int64_t block_row, int64_t block_column,
                        double* ring, double*) const {
    using Products = Engine::Products;
    multiply_pairs<Engine>(products, columns, block_row, columns, block_column, ring);
    const GradSimilarity negative = gram ? GradSimilarity{0, 0} : grad_similarities->negative;
    const GradSimilarity positive =
        gram ? GradSimilarity{grad_similarities->positive.alpha - grad_similarities->negative.alpha,
                              grad_similarities->positive.beta - grad_similarities->negative.beta}
             : grad_similarities->positive;
    const int lane = threadIdx.x % 32;
    const int64_t count = columns.count;
#pragma unroll
    for (int c = 0; c < Products::kColumns; ++c) {
      const int64_t j = tile.column + Products::column(lane, c), label = labels[min(j, count - 1)];
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r) {
        const int64_t i = tile.row + Products::row(lane, r);
        const GradSimilarity grad_similarity = labels[min(i, count - 1)] == label ? positive : negative;
        products.at(r, c) =
            i < count && j < count && i != j ? grad_similarity.alpha + grad_similarity.beta * products.at(r, c) : 0;
      }
    }
    return false;
  }
};

// out[i][c] = r_i · H_c
__global__ void __launch_bounds__(kTileThreads, 3) multiply_gram(const __grid_constant__ Gram gram, double* out) {
  using Products = Engine::Products;
  const int64_t tiles = gram.h.tiles(), row = blockIdx.x / tiles * kSide, column = blockIdx.x % tiles * kSide;
  Products products;
  multiply_pairs<Engine>(products, gram.rows, row, gram.h, column, reinterpret_cast<double*>(dynamic_shared()));
  const WarpTile tile = WarpTile::of_block(row, column);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < Products::kRows; ++r)
#pragma unroll
    for (int c = 0; c < Products::kColumns; ++c)
      out[(tile.row + Products::row(lane, r)) * gram.h.padded() + tile.column + Products::column(lane, c)] =
          products.at(r, c);
}

template <class Real>
struct FinishInput {
  Rows rows;
  const int64_t* order;
  int64_t dim;
  GradientParts<double> parts;
  const GradSimilarities* grad_similarities;
  Gram gram;
  const double* products;  // [padded n, padded d]  H r_i; null without a Gram matrix
  Real* out;
};

// Through r = x / ‖x‖, which takes away what lies along r: the pair (i, i) need not be.
template <class Real>
__global__ void __launch_bounds__(kReduceThreads) finish_moment_gradient(const __grid_constant__ FinishInput<Real> in) {
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t{blockIdx.x} * kReduceWarps + threadIdx.x / 32;
  if (i >= in.rows.count) return;
  const double* row = in.rows.values + i * in.rows.pitch;
  const GradSimilarity all = in.grad_similarities->negative;
  double on_mean = 0;
  if (in.products)
    for (int64_t c = lane; c < in.dim; c += 32) on_mean += row[c] * in.gram.mean[c];
  on_mean = warp_sum(on_mean);
  const auto gradient = [&](int64_t c) {
    double sum = 0;
    for (int64_t part = 0; part < in.parts.parts; ++part)
      if (in.parts.has(part, i)) sum += in.parts.sums[in.parts.row_at(part, i) * in.parts.pitch + c];
    if (in.products)
      sum += static_cast<double>(in.rows.count) * (all.alpha + all.beta * on_mean) * in.gram.mean[c] +
             all.beta * in.products[i * in.gram.h.padded() + c];
    return 2 * sum;
  };
  double along = 0;
  const double scale = in.rows.scales[i];
  for (int64_t c = lane; c < in.dim; c += 32) along += gradient(c) * row[c];
  along = warp_sum(along);
  Real* out = in.out + place_of(in.order, i, in.rows.count) * in.dim;
  for (int64_t c = lane; c < in.dim; c += 32) out[c] = static_cast<Real>((gradient(c) - along * row[c]) * scale);
}

struct Scratch {
  Rows rows;
  bool with_gram;
  Gram gram;
  // forward
  int64_t parts, blocks;
  PairMoments* moments;
  // backward
  int64_t count_blocks;
  int64_t* counts;
  GradSimilarities* grad_similarities;
  double* products;
  GradientParts<double> gradient;
};

template <class Storage>
Scratch take_scratch(const LabeledFeatures<Storage>& features, bool backward, Workspace& workspace) {
  Scratch out{};
  out.rows = take_packed<double>(features.count, features.dim, workspace);
  out.with_gram = features.dim > 0 && features.count > features.dim;
  if (out.with_gram) out.gram = take_gram(out.rows, features.dim, workspace);
  if (backward) {
    out.count_blocks = min(ceil_div<int64_t>(features.count, kReduceThreads), kCountBlocks);
    out.counts = workspace.take<int64_t>(out.count_blocks);
    out.grad_similarities = workspace.take<GradSimilarities>(1);
    if (out.with_gram) out.products = workspace.take<double>(out.rows.padded() * out.gram.h.padded());
    out.gradient = take_gradient_parts(out.rows, out.rows, workspace);
  } else {
    const int64_t tiles = out.rows.tiles();
    out.parts = tiles == 0 ? 1 : min(min(ceil_div(kMomentBlocks, tiles), tiles), kMostMomentParts);
    out.blocks = tiles * out.parts;
    out.moments = workspace.take<PairMoments>(out.blocks);
  }
  return out;
}

}  // namespace

template <class Storage>
int64_t similarity_moments_workspace(const LabeledFeatures<Storage>& features, bool backward) {
  Workspace workspace(nullptr);
  take_scratch(features, backward, workspace);
  return workspace.bytes();
}

template <class Storage>
const char* similarity_moments(const LabeledFeatures<Storage>& features, Compute<Storage>* moments, void* memory,
                               CudaStream stream) {
  Workspace workspace(memory);
  const Scratch scratch = take_scratch(features, false, workspace);
  const PackInput<Storage> pack{features.features, features.order, nullptr, features.dim};
  if (const char* error = launch_pack_normalized<double>(pack, scratch.rows, stream)) return error;
  int64_t row_blocks = 0;
  if (scratch.with_gram) {
    if (const char* error = launch_gram(scratch.gram, stream)) return error;
    row_blocks = min(ceil_div<int64_t>(features.count, kGramWarps), kRowBlocks);
    if (const char* error = launch(sum_rows, row_blocks, kGramThreads, 0, stream, scratch.gram)) return error;
  }
  if (const char* error =
          launch(sweep_moments, scratch.blocks, kTileThreads, kRingBytes<double>, stream,
                 MomentInput{scratch.rows, features.labels, !scratch.with_gram, scratch.parts, scratch.moments}))
    return error;
  return launch(finish_moments<Compute<Storage>>, 1, kReduceThreads, 0, stream, scratch.moments, scratch.blocks,
                scratch.gram, row_blocks, moments);
}

template <class Storage>
const char* similarity_moments_backward(const LabeledFeatures<Storage>& features, const Compute<Storage>* moments,
                                        const Compute<Storage>* grad_moments, Compute<Storage>* grad_features,
                                        void* memory, CudaStream stream) {
  using Real = Compute<Storage>;
  if (features.count == 0) return nullptr;
  Workspace workspace(memory);
  const Scratch scratch = take_scratch(features, true, workspace);
  const PackInput<Storage> pack{features.features, features.order, nullptr, features.dim};
  if (const char* error = launch_pack_normalized<double>(pack, scratch.rows, stream)) return error;
  if (const char* error = launch(count_positives, scratch.count_blocks, kReduceThreads, 0, stream, features.labels,
                                 features.count, scratch.counts))
    return error;
  if (const char* error =
          launch(find_grad_similarities<Real>, 1, kReduceThreads, 0, stream, scratch.counts, scratch.count_blocks,
                 features.count, moments, grad_moments, scratch.grad_similarities))
    return error;
  if (scratch.with_gram) {
    if (const char* error = launch_gram(scratch.gram, stream)) return error;
    if (const char* error = launch(multiply_gram, scratch.rows.tiles() * scratch.gram.h.tiles(), kTileThreads,
                                   kRingBytes<double>, stream, scratch.gram, scratch.products))
      return error;
  }
  const MomentWeights weights{scratch.rows, features.labels, scratch.grad_similarities, scratch.with_gram};
  if (const char* error = launch_sweep_gradient(weights, scratch.gradient, stream)) return error;
  return launch(finish_moment_gradient<Real>, ceil_div<int64_t>(features.count, kReduceWarps), kReduceThreads, 0,
                stream,
                FinishInput<Real>{scratch.rows, features.order, features.dim, scratch.gradient,
                                  scratch.grad_similarities, scratch.gram, scratch.products, grad_features});
}

#define SSM_INSTANTIATE(Storage)                                                                                  \
  template int64_t similarity_moments_workspace(const LabeledFeatures<Storage>&, bool);                           \
  template const char* similarity_moments(const LabeledFeatures<Storage>&, Compute<Storage>*, void*, CudaStream); \
  template const char* similarity_moments_backward(const LabeledFeatures<Storage>&, const Compute<Storage>*,      \
                                                   const Compute<Storage>*, Compute<Storage>*, void*, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::cuda
