// SPDX-License-Identifier: BSD-3-Clause
// What the walks over pairs share: how they are cut into tasks, padded copies of their operands, and partial sums of
// gradients.
#pragma once

#include "../common/arithmetic.h"
#include "../common/buffer.h"
#include "../common/parallel_for.h"
#include "../common/simd.h"
#include "pair_network.h"

namespace ssmkernels::SSM_ISA {

// All pairs are cut into up to 8 ranges of rows by 8 of columns; a list into up to 8 ranges. Each task has the
// gradients of its own part: a row of x meets one task per range of columns, a row of y one per range of rows, and of a
// list all tasks.
struct TaskGrid {
  static constexpr int64_t kParts = 8;
  int64_t row_parts, column_parts, rows, columns;  // rows, columns: of one part
  bool is_list;

  template <class Real>
  TaskGrid(const PairNetwork<Real>& network, int64_t row_multiple, int64_t column_multiple) : is_list(network.pairs) {
    if (is_list) {  // few pairs are not worth gradients of all rows more than once
      row_parts = 1;
      column_parts = clamp(network.count / (2 * (network.x_rows + network.y_rows) + 1), 1, kParts);
      rows = 1;
      columns = part_of(network.count, column_parts, column_multiple);
      return;
    }
    rows = part_of(network.x_rows, clamp(network.x_rows / 32, 1, kParts), row_multiple);
    columns = part_of(network.y_rows, clamp(network.y_rows / 64, 1, kParts), column_multiple);
    row_parts = divide_up(network.x_rows, rows);
    column_parts = divide_up(network.y_rows, columns);
  }

  static int64_t part_of(int64_t size, int64_t parts, int64_t multiple) {
    return clamp(divide_up(divide_up(size, parts), multiple), 1, size + 1) * multiple;
  }

  int64_t tasks() const {
    return row_parts * column_parts;
  }
  int64_t x_partials() const {
    return column_parts;
  }
  int64_t y_partials() const {
    return is_list ? column_parts : row_parts;
  }
};

// A matrix whose rows are whole vectors, zero-padded; rows past the last one are zero too.
template <class Real>
class Padded {
 public:
  Padded(const Real* from, int64_t rows, int64_t columns, Real factor, int64_t row_multiple, ParallelFor parallel_for)
      : rows(divide_up(rows, row_multiple) * row_multiple),
        stride(divide_up(columns, kLanes<Real>) * kLanes<Real>),
        values_(this->rows * stride) {
    const int64_t block = 64;
    parallel_for(divide_up(this->rows, block), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * block; i < end * block && i < this->rows; ++i) {
        Real* to = values_.data() + i * stride;
        for (int64_t c = 0; c < columns; ++c) to[c] = i < rows ? factor * from[i * columns + c] : Real(0);
        for (int64_t c = columns; c < stride; ++c) to[c] = 0;
      }
    });
  }

  const Real* operator[](int64_t i) const {
    return values_.data() + i * stride;
  }

  const int64_t rows, stride;

 private:
  Buffer<Real> values_;
};

// `count` matrices of the same shape, to be added in order.
template <class Real>
class Partials {
 public:
  Partials(int64_t count, int64_t rows, int64_t stride)
      : count(count), rows(rows), stride(stride), values_(count * rows * stride) {}

  Real* row(int64_t part, int64_t i) const {
    return values_.data() + (part * rows + i) * stride;
  }
  void clear(int64_t part, int64_t begin, int64_t end) const {
    Real* values = row(part, begin);
    for (int64_t k = 0; k < (end - begin) * stride; ++k) values[k] = 0;
  }
  Vec<Real> sum(int64_t i, int64_t c) const {
    Vec<Real> total{};
    for (int64_t part = 0; part < count; ++part) total += load(row(part, i) + c);
    return total;
  }

  const int64_t count, rows, stride;

 private:
  Buffer<Real> values_;
};

}  // namespace ssmkernels::SSM_ISA
