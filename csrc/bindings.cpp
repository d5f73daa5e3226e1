// The only pybind11 file: integers in, errors as exceptions. Shapes and dtypes are checked in Python.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace py = pybind11;

namespace {

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

#ifdef SAAP_CUDA
void check(const char* kernel, int error) {
  if (error != 0) throw std::runtime_error(std::string(kernel) + ": " + saap::cuda_error_string(error));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of saap_kernels; addresses are integers, pitches are in elements.";
#ifdef SAAP_CUDA
  m.attr("cuda_built") = true;
  m.attr("cuda_archs") = SAAP_CUDA_ARCHS;
#else
  m.attr("cuda_built") = false;
  m.attr("cuda_archs") = "";
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("has_avx2", &saap::has_avx2, "Whether the AVX2 and FMA code paths run on this processor.");
  m.def(
      "salience_reduce_f32",
      [](uintptr_t gradient, int64_t gradient_pitch, uintptr_t weight, int64_t weight_pitch, int64_t rows,
         int64_t columns, int64_t unit_size, int axis, uintptr_t sums, int threads) {
        py::gil_scoped_release release;
        saap::salience_reduce_f32(address<const float>(gradient), gradient_pitch, address<const float>(weight),
                                  weight_pitch, rows, columns, unit_size, axis, address<float>(sums), threads);
      },
      py::arg("gradient"), py::arg("gradient_pitch"), py::arg("weight"), py::arg("weight_pitch"), py::arg("rows"),
      py::arg("columns"), py::arg("unit_size"), py::arg("axis"), py::arg("sums"), py::arg("threads"));
  m.def(
      "coupled_accumulate_f32",
      [](uintptr_t gradient, int64_t gradient_pitch, uintptr_t weight, int64_t weight_pitch, int64_t rows,
         int64_t columns, uintptr_t mean, uintptr_t square, int threads) {
        py::gil_scoped_release release;
        saap::coupled_accumulate_f32(address<const float>(gradient), gradient_pitch, address<const float>(weight),
                                     weight_pitch, rows, columns, address<float>(mean), address<float>(square),
                                     threads);
      },
      py::arg("gradient"), py::arg("gradient_pitch"), py::arg("weight"), py::arg("weight_pitch"), py::arg("rows"),
      py::arg("columns"), py::arg("mean"), py::arg("square"), py::arg("threads"));
  m.def(
      "activation_sums_f32",
      [](uintptr_t x, int64_t x_pitch, uintptr_t dx, int64_t dx_pitch, uintptr_t spans, int64_t sequences,
         int64_t features, uintptr_t shift, uintptr_t salience, uintptr_t statistics, int threads) {
        py::gil_scoped_release release;
        saap::activation_sums_f32({address<const float>(x), x_pitch, address<const float>(dx), dx_pitch,
                                   address<const int32_t>(spans), sequences, features, address<const float>(shift),
                                   address<float>(salience), address<float>(statistics), threads});
      },
      py::arg("x"), py::arg("x_pitch"), py::arg("dx"), py::arg("dx_pitch"), py::arg("spans"), py::arg("sequences"),
      py::arg("features"), py::arg("shift"), py::arg("salience"), py::arg("statistics"), py::arg("threads"));
#ifdef SAAP_CUDA
  m.def("activation_salience", [](uintptr_t y, int64_t y_pitch, uintptr_t dy, int64_t dy_pitch, uintptr_t spans,
                                  int64_t sequences, int64_t chunks, int64_t rows_per_partial, int64_t features,
                                  int64_t unit_size, int dtype, uintptr_t partial, uintptr_t result,
                                  uintptr_t stream) {
    const saap::ActivationSalience arguments{address<const void>(y), y_pitch, address<const void>(dy), dy_pitch,
                                             address<const int32_t>(spans), sequences, chunks, rows_per_partial,
                                             features, unit_size, static_cast<saap::Dtype>(dtype),
                                             address<float>(partial), address<float>(result), address<void>(stream)};
    check("activation_salience", saap::activation_salience(arguments));
  });
#endif
}
