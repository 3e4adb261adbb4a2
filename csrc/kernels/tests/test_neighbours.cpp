// SPDX-License-Identifier: BSD-3-Clause
// Nearest neighbours and the graph of their lists without torch, on the instruction set in use: against sorting
// everything, and bit for bit between one thread and several. Run it under the sanitizers too.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "../graph/nearest_neighbours.h"
#include "../graph/symmetric_graph.h"
#include "harness.h"

using namespace ssmkernels;
using namespace ssmkernels::test;

namespace {

template <class Real>
constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();

enum class Kind { random, ties, groups, curve };  // groups: of 300 equal rows; curve: neighbours have near indices

template <class Real>
std::vector<Real> draw(int64_t rows, int64_t dim, Kind kind, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<Real> values(rows * dim);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < dim; ++d) {
      Real& value = values[i * dim + d];
      value = static_cast<Real>(normal(random));
      if (kind == Kind::ties) value = std::round(value);
      if (kind == Kind::groups && i % 300 != 0) value = values[(i - i % 300) * dim + d];
      if (kind == Kind::curve) value = static_cast<Real>(std::sin(0.001 * static_cast<double>(i) + d));
    }
  return values;
}

template <class Real>
struct Lists {
  std::vector<int32_t> ids;
  std::vector<Real> scores;
};

template <class Real>
struct Search {
  std::vector<Real> rows, columns, offsets;  // within the rows where there are no columns; offsets may be empty
  int64_t dim, neighbours, num_rows, num_columns;
  bool within;

  Lists<Real> run(ParallelFor parallel_for) const {
    Lists<Real> out{std::vector<int32_t>(num_rows * neighbours, -7), std::vector<Real>(num_rows * neighbours, -7)};
    const NearestNeighbours<Real> problem{rows.data(),
                                          within ? rows.data() : columns.data(),
                                          offsets.empty() ? nullptr : offsets.data(),
                                          num_rows,
                                          num_columns,
                                          dim,
                                          neighbours,
                                          within};
    SSM_CALL_ISA(nearest_neighbours, problem, out.ids.data(), out.scores.data(), parallel_for);
    return out;
  }

  // Of each row with each column, without offsets. Those within the rows are of both orders at once: test_products.
  std::vector<Real> products() const {
    std::vector<Real> both = rows;
    if (!within) both.insert(both.end(), columns.begin(), columns.end());
    std::vector<int64_t> left(num_columns), right(num_columns);
    for (int64_t j = 0; j < num_columns; ++j) right[j] = within ? j : num_rows + j;
    std::vector<Real> out(num_rows * num_columns);
    for (int64_t i = 0; i < num_rows; ++i) {
      std::fill(left.begin(), left.end(), i);
      Real* const row = out.data() + i * num_columns;
      const int64_t count = within ? i + 1 : num_columns;
      SSM_CALL_ISA(pair_products, both.data(), dim, left.data(), right.data(), count, row, serial_for);
      if (!within) continue;
      for (int64_t j = 0; j < i; ++j) out[j * num_columns + i] = row[j];
    }
    return out;
  }

  Lists<Real> sorted(std::vector<Real> scores_of_all) const {
    Lists<Real> out;
    for (int64_t i = 0; i < num_rows; ++i) {
      Real* const scores = scores_of_all.data() + i * num_columns;
      std::vector<int32_t> order;
      for (int32_t j = 0; j < num_columns; ++j) {
        if (!offsets.empty()) scores[j] += offsets[j];
        if (!(within && j == i) && scores[j] == scores[j]) order.push_back(j);
      }
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
      for (int64_t k = 0; k < neighbours; ++k) {
        const bool there = k < static_cast<int64_t>(order.size());
        out.ids.push_back(there ? order[k] : -1);
        out.scores.push_back(there ? scores[order[k]] : kNan<Real>);
      }
    }
    return out;
  }

  void check_against_sorting(const std::vector<Real>& scores_of_all) const {
    const Lists<Real> ours = run(serial_for), threaded = run(threads_for), expected = sorted(scores_of_all);
    check(ours.ids == expected.ids, "neighbours", static_cast<double>(num_rows));
    Values wanted(expected.scores.begin(), expected.scores.end());
    bool same = true;
    for (size_t p = 0; p < wanted.size(); ++p)
      same &= ours.scores[p] == expected.scores[p] || (std::isnan(ours.scores[p]) && ours.ids[p] == -1);
    check(same, "scores", static_cast<double>(num_rows));
    check(ours.ids == threaded.ids && same_bits(ours.scores, threaded.scores), "the same on several threads");
  }
};

template <class Real>
Search<Real> make(int64_t rows, int64_t columns, int64_t dim, int64_t neighbours, Kind kind, std::mt19937& random) {
  Search<Real> search{{}, {}, {}, dim, neighbours, rows, columns > 0 ? columns : rows, columns == 0};
  search.rows = draw<Real>(rows, dim, kind, random);
  search.columns = draw<Real>(columns, dim, kind, random);
  return search;
}

template <class Real>
void test_sizes(int64_t rows, int64_t columns, int64_t dim, int64_t neighbours, Kind kind) {
  std::mt19937 random(static_cast<unsigned>(rows + columns + dim));
  Search<Real> search = make<Real>(rows, columns, dim, neighbours, kind, random);
  const std::vector<Real> products = search.products();  // most of the time under a sanitizer
  search.check_against_sorting(products);
  search.offsets = draw<Real>(search.num_columns, 1, Kind::ties, random);
  search.check_against_sorting(products);
}

#ifdef __SANITIZE_THREAD__
constexpr int64_t kMany = 400;  // every product is traced there; two tiles of rows and a part, where others have more
#else
constexpr int64_t kMany = 700;
#endif

template <class Real>
void test_search() {
  for (const Kind kind : {Kind::random, Kind::ties, Kind::groups, Kind::curve})
    for (const int64_t dim : {0, 1, 7, 64, 300}) {
      test_sizes<Real>(2, 0, dim, 1, kind);
      test_sizes<Real>(61, 0, dim, 60, kind);
      test_sizes<Real>(kMany, 0, dim, 20, kind);
      test_sizes<Real>(1, 500, dim, 33, kind);
      test_sizes<Real>(200, 3, dim, 3, kind);
      test_sizes<Real>(0, 5, dim, 2, kind);
    }
}

template <class Real>
void test_products() {
  std::mt19937 random(5);
  const int64_t rows = 40, dim = 301;
  const std::vector<Real> x = draw<Real>(rows, dim, Kind::random, random);
  std::vector<int64_t> left, right;
  Values expected;
  double largest = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      left.push_back(i);
      right.push_back(j);
      double sum = 0, terms = 0;
      for (int64_t d = 0; d < dim; ++d) {
        sum += static_cast<double>(x[i * dim + d]) * x[j * dim + d];
        terms += std::abs(static_cast<double>(x[i * dim + d]) * x[j * dim + d]);
      }
      expected.push_back(sum);
      largest = std::max(largest, terms);
    }
  std::vector<Real> ours(left.size()), mirrored(left.size());
  const auto pairs = static_cast<int64_t>(left.size());
  SSM_CALL_ISA(pair_products, x.data(), dim, left.data(), right.data(), pairs, ours.data(), serial_for);
  SSM_CALL_ISA(pair_products, x.data(), dim, right.data(), left.data(), pairs, mirrored.data(), threads_for);
  expect_close("products", ours, expected, dim * std::numeric_limits<Real>::epsilon() * largest);
  check(same_bits(ours, mirrored), "products of (j, i)");
}

// A row with NaN has no neighbours and is nobody's; other rows are as without it.
template <class Real>
void test_nan() {
  for (const int64_t columns : {0, 250}) {
    std::mt19937 random(static_cast<unsigned>(columns));
    Search<Real> search = make<Real>(250, columns, 9, 249, Kind::random, random);
    std::vector<Real>& spoiled = columns > 0 ? search.columns : search.rows;
    spoiled[100 * 9 + 4] = kNan<Real>;
    search.check_against_sorting(search.products());
    const Lists<Real> lists = search.run(serial_for);
    check(std::find(lists.ids.begin(), lists.ids.end(), 100) == lists.ids.end(), "NaN: nobody's neighbour");
    if (columns == 0) check(lists.ids[100 * 249] == -1, "NaN: no neighbours");
  }
}

template <class Real>
void test_graph(int64_t nodes, int64_t neighbours, bool hostile) {
  std::mt19937 random(static_cast<unsigned>(nodes));
  std::vector<int32_t> ids, all(nodes);
  std::vector<Real> weights;
  for (int32_t j = 0; j < nodes; ++j) all[j] = j;
  for (int64_t i = 0; i < nodes; ++i) {
    std::shuffle(all.begin(), all.end(), random);
    for (int64_t k = 0; k < neighbours; ++k) {
      ids.push_back(all[k]);
      weights.push_back(static_cast<Real>(static_cast<int>(random() % 9) - 2));
    }
  }
  if (hostile && nodes > 4) {
    ids[0] = -1;
    ids[neighbours] = static_cast<int32_t>(nodes);
    ids[2 * neighbours] = std::numeric_limits<int32_t>::min();
    weights[3 * neighbours] = kNan<Real>;
  }
  std::vector<Values> dense(nodes, Values(nodes, 0));
  std::vector<std::vector<int>> times(nodes, std::vector<int>(nodes, 0));
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t p = i * neighbours; p < (i + 1) * neighbours; ++p)
      if (ids[p] >= 0 && ids[p] < nodes && weights[p] > 0) {
        dense[i][ids[p]] += weights[p];
        dense[ids[p]][i] += weights[p];
        ++times[i][ids[p]];
        ++times[ids[p]][i];
      }

  const NeighbourLists<Real> lists{ids.data(), weights.data(), nodes, neighbours};
  std::vector<int64_t> starts(nodes + 2), positions(nodes * neighbours), crow(nodes + 1, -7);
  const TransposedLists transposed{starts.data(), positions.data()};
  SSM_CALL_ISA(symmetric_rows, lists, transposed, crow.data(), threads_for);
  const int64_t edges = crow[nodes];
  std::vector<int32_t> col(edges, -7);
  std::vector<Real> weight(edges, -7);
  std::vector<int64_t> reverse(edges, -7);
  std::vector<char> mutual(edges, 7);
  SSM_CALL_ISA(symmetric_entries, lists, transposed, crow.data(), col.data(), weight.data(), reverse.data(),
               reinterpret_cast<bool*>(mutual.data()), threads_for);
  int64_t e = 0;
  for (int64_t i = 0; i < nodes; ++i) {
    check(crow[i] == e, "graph: where a row begins");
    for (int32_t j = 0; j < nodes; ++j) {
      if (times[i][j] == 0) continue;
      check(e < edges && col[e] == j && weight[e] == dense[i][j], "graph: an entry");
      check(e < edges && mutual[e] == (times[i][j] == 2), "graph: mutual");
      const int64_t mirror = e < edges ? reverse[e] : -1;
      check(mirror >= crow[j] && mirror < crow[j + 1] && col[mirror] == i, "graph: reverse");
      ++e;
    }
  }
  check(e == edges, "graph: entries");
}

template <class Real>
void test_all() {
  test_search<Real>();
  test_products<Real>();
  test_nan<Real>();
  for (const bool hostile : {false, true}) {
    test_graph<Real>(1, 1, hostile);
    test_graph<Real>(40, 7, hostile);
    test_graph<Real>(123, 122, hostile);
  }
  test_graph<Real>(0, 3, false);
  test_graph<Real>(5, 0, false);
}

}  // namespace

int main() {
  context = isa_name(current_isa());
  test_all<double>();
  test_all<float>();
  return report();
}
