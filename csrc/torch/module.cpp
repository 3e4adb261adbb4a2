// SPDX-License-Identifier: BSD-3-Clause
// The Python module _C. Importing it registers the ops: each x.cpp beside this file does that when the library is
// loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../kernels/common/isa.h"
#include "../kernels/common/values.h"
#include "build_info.h"
#include "interrupt.h"

namespace py = pybind11;

namespace {

using ssmkernels::Isa;

std::string current_isa() {
  return ssmkernels::isa_name(ssmkernels::current_isa());
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (isa <= ssmkernels::best_isa()) names.emplace_back(ssmkernels::isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  if (ssmkernels::set_isa(name.c_str())) return;
  std::string known;
  for (const std::string& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("name is '" + name + "'; this processor runs " + known);
}

// A Python exception on its way through C++, where pybind11 raises it again. torch's pybind11 may be of another version
// than this one; this base class is the same in all of them.
class RaisedBySignal : public py::builtin_exception {
 public:
  RaisedBySignal() : builtin_exception("a signal's handler raised") {
    PyErr_Fetch(&type_, &value_, &traceback_);
  }
  void set_error() const override {
    PyErr_Restore(type_, value_, traceback_);
  }

 private:
  PyObject *type_, *value_, *traceback_;
};

unsigned long main_thread = 0;

// Python runs the handlers of signals in its main thread, between two of its own instructions: during a long op, never
// but for this.
void check_signals() {
  if (PyThread_get_thread_ident() != main_thread) return;
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw RaisedBySignal();
}

// Checks of values: torch's own reductions take 3 µs each and more for the code they need, longer than the kernels of a
// small call.
template <class T>
void define_checks(py::module_& module, const std::string& dtype) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def(("all_within_" + dtype).c_str(),
             [](uintptr_t address, int64_t count, T low, T high) {
               return ssmkernels::all_within(reinterpret_cast<const T*>(address), count, low, high);
             },
             no_gil);
  if constexpr (std::is_integral_v<T>)
    module.def(("ascends_from_zero_" + dtype).c_str(),
               [](uintptr_t address, int64_t count, int64_t last) {
                 return ssmkernels::ascends_from_zero(reinterpret_cast<const T*>(address), count, last);
               },
               no_gil);
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() =
      "Build information and instruction-set control of ssmkernels; importing it registers torch.ops.ssmkernels.";
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  ssmkernels::binding::interrupt_check = &check_signals;
  module.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); }, "What was built, as a dict.");
  module.def("current_isa", &current_isa, "The instruction set that CPU kernels run with.");
  module.def("available_isas", &available_isas, "The instruction sets that this processor runs.");
  define_checks<float>(module, "float32");
  define_checks<double>(module, "float64");
  define_checks<int32_t>(module, "int32");
  define_checks<int64_t>(module, "int64");
  module.def("set_isa", &set_isa, py::arg("name"),
             "Chooses the instruction set; ValueError if this processor does not run it.");
}
