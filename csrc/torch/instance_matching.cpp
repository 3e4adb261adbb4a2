// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/memory/instance_matching.h"

#include "memory.h"

namespace ssmkernels::binding {
namespace {

struct Inputs {
  Tensor query_weak, query_strong, bank, bank_labels, probs_weak;
  int64_t rows, dim, classes;
  double temperature_weak, temperature_strong;
  bool allow_tf32;

  Inputs(const Tensor& weak, const Tensor& strong, const Tensor& bank_, const Tensor& labels, const Tensor& probs,
         double t_weak, double t_strong, bool tf32)
      : query_weak(check_query(weak, "query_weak", bank_)),
        query_strong(check_query(strong, "query_strong", bank_)),
        bank(bank_),
        bank_labels(check_bank(bank_, labels, weak)),
        probs_weak(as_contiguous(probs)),
        rows(weak.size(0)),
        dim(bank_.size(1)),
        classes(probs.size(-1)),
        temperature_weak(t_weak),
        temperature_strong(t_strong),
        allow_tf32(tf32) {
    check_shape(strong, "query_strong", rows, dim);
    check_shape(probs, "probs_weak", rows, classes);
    check_like(strong, "query_strong", weak.scalar_type(), weak);
    check_like(probs, "probs_weak", compute_dtype(weak), weak);
  }

  template <class Storage>
  InstanceMatching<Storage> problem() const {
    return {data<Storage>(query_weak),
            data<Storage>(query_strong),
            data<Compute<Storage>>(probs_weak),
            bank_view<Storage>(bank, bank_labels, classes),
            rows,
            temperature_weak,
            temperature_strong,
            allow_tf32};
  }

  template <class Storage>
  Threads threads(bool with_gradient) const {
    return Threads(bank_work(with_gradient ? 4 : 2, rows, problem<Storage>().bank));
  }
};

template <class Storage>
Tensor workspace(const InstanceMatching<Storage>& problem, const Tensor& like, bool with_gradient) {
  return new_tensor(like, {cuda::instance_matching_workspace(problem, with_gradient)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor> instance_matching_op(const Tensor& query_weak, const Tensor& query_strong,
                                                        const Tensor& bank, const Tensor& bank_labels,
                                                        const Tensor& probs_weak, double temperature_weak,
                                                        double temperature_strong, double alpha, bool with_gradient,
                                                        bool allow_tf32) {
  const Inputs in(query_weak, query_strong, bank, bank_labels, probs_weak, temperature_weak, temperature_strong,
                  allow_tf32);
  STD_TORCH_CHECK(bank.size(0) > 0, "bank must have at least one slot");
  const ScalarType dtype = compute_dtype(query_weak);
  Tensor pseudo_probs = new_tensor(bank, {in.rows, in.classes}, dtype);
  Tensor loss = new_tensor(bank, {in.rows}, dtype);
  Tensor gradient = new_tensor(bank, {with_gradient ? in.rows : 0, in.dim}, dtype);
  if (in.rows == 0) return {pseudo_probs, loss, gradient};

  dispatch_dtype(query_weak, [&](auto storage) {
    using Storage = decltype(storage);
    using Real = Compute<Storage>;
    const InstanceMatchingResult<Real> result{data<Real>(pseudo_probs), data<Real>(loss),
                                              with_gradient ? data<Real>(gradient) : nullptr, alpha};
    run_on_device(
        bank, "instance_matching",
        [&] { SSM_CALL_ISA(instance_matching, in.problem<Storage>(), result, in.threads<Storage>(with_gradient)); },
        [&](CudaStream stream) {
          if constexpr (kWithCuda) {
            const auto problem = with_kept_order(in.problem<Storage>(), in.bank_labels, stream);
            return cuda::instance_matching(problem, result, data<void>(workspace(problem, bank, with_gradient)),
                                           stream);
          }
        });
  });
  return {pseudo_probs, loss, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> instance_matching_partial_op(
    const Tensor& query_weak, const Tensor& query_strong, const Tensor& bank, const Tensor& bank_labels,
    const Tensor& probs_weak, double temperature_weak, double temperature_strong, bool allow_tf32) {
  const Inputs in(query_weak, query_strong, bank, bank_labels, probs_weak, temperature_weak, temperature_strong,
                  allow_tf32);
  const ScalarType dtype = compute_dtype(query_weak);
  auto column = [&] { return new_tensor(bank, {in.rows}, dtype); };
  Tensor log_weak = column(), log_target = column(), log_strong = column(), target_logit = column();
  Tensor aggregated = new_tensor(bank, {in.rows, in.classes}, dtype);
  Tensor target_mean = new_tensor(bank, {in.rows, in.dim}, dtype),
         strong_mean = new_tensor(bank, {in.rows, in.dim}, dtype);
  if (in.rows > 0) {
    dispatch_dtype(query_weak, [&](auto storage) {
      using Storage = decltype(storage);
      using Real = Compute<Storage>;
      const InstanceMatchingPartial<Real> partial{
          data<Real>(log_weak),     data<Real>(log_target),  data<Real>(log_strong), data<Real>(aggregated),
          data<Real>(target_logit), data<Real>(target_mean), data<Real>(strong_mean)};
      run_on_device(
          bank, "instance_matching_partial",
          [&] { SSM_CALL_ISA(instance_matching_partial, in.problem<Storage>(), partial, in.threads<Storage>(true)); },
          [&](CudaStream stream) {
            if constexpr (kWithCuda) {
              const auto problem = with_kept_order(in.problem<Storage>(), in.bank_labels, stream);
              return cuda::instance_matching_partial(problem, partial, data<void>(workspace(problem, bank, true)),
                                                     stream);
            }
          });
    });
  }
  return {log_weak, log_target, log_strong, aggregated, target_logit, target_mean, strong_mean};
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "instance_matching(Tensor query_weak, Tensor query_strong, Tensor bank, Tensor bank_labels, Tensor probs_weak, "
      "float "
      "temperature_weak, "
      "float temperature_strong, float alpha, bool with_gradient, bool allow_tf32) -> (Tensor pseudo_probs, Tensor "
      "loss, Tensor gradient)");
  library.def(
      "instance_matching_partial(Tensor query_weak, Tensor query_strong, Tensor bank, Tensor bank_labels, Tensor "
      "probs_weak, "
      "float temperature_weak, float temperature_strong, bool allow_tf32) -> (Tensor log_weak, Tensor log_target, "
      "Tensor log_strong, "
      "Tensor aggregated, Tensor target_logit, Tensor target_mean, Tensor strong_mean)");
}
SSM_REGISTER("instance_matching", instance_matching_op)
SSM_REGISTER("instance_matching_partial", instance_matching_partial_op)

}  // namespace
}  // namespace ssmkernels::binding
