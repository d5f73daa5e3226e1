// The only pybind11 file: integers in, errors as exceptions. Shapes and dtypes are checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

namespace py = pybind11;

namespace {

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// data, bytes from row to row, columns, storage, scale, zero, dtype of both, group size, groups
using PackedRowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int, uintptr_t, uintptr_t, int, int64_t, int64_t>;

saap::PackedRows packed_rows(const PackedRowsTuple& t) {
  const auto [data, pitch, columns, storage, scale, zero, scale_dtype, group_size, groups] = t;
  return {address<const uint8_t>(data), pitch, columns, static_cast<saap::Storage>(storage),
          address<const void>(scale), address<const void>(zero), static_cast<saap::Dtype>(scale_dtype),
          group_size, groups};
}

#ifdef SAAP_CUDA
void check(int error) {
  if (error != 0) throw std::runtime_error(saap::cuda_error_string(error));
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
  m.def(
      "packed_linear_f32",
      [](const PackedRowsTuple& weight, int64_t rows, int64_t stride, uintptr_t x, int64_t x_pitch, int64_t tokens,
         uintptr_t bias, int activation, uintptr_t result, int64_t result_pitch, int threads, bool portable) {
        py::gil_scoped_release release;
        saap::packed_linear_f32({packed_rows(weight), rows, stride, address<const float>(x), x_pitch, tokens,
                                 address<const float>(bias), static_cast<saap::Activation>(activation),
                                 address<float>(result), result_pitch, threads, portable});
      },
      py::arg("weight"), py::arg("rows"), py::arg("stride"), py::arg("x"), py::arg("x_pitch"), py::arg("tokens"),
      py::arg("bias"), py::arg("activation"), py::arg("result"), py::arg("result_pitch"), py::arg("threads"),
      py::arg("portable") = false);
  m.def(
      "unpack_rows_f32",
      [](const PackedRowsTuple& weight, int64_t first, int64_t count, uintptr_t result, int64_t result_pitch,
         int threads, bool portable) {
        py::gil_scoped_release release;
        saap::unpack_rows_f32(packed_rows(weight), first, count, address<float>(result), result_pitch, threads,
                              portable);
      },
      py::arg("weight"), py::arg("first"), py::arg("count"), py::arg("result"), py::arg("result_pitch"),
      py::arg("threads"), py::arg("portable") = false);
  m.def(
      "moved_rows_f32",
      [](const PackedRowsTuple& weight, uintptr_t up, uintptr_t down, int64_t down_pitch, int64_t rank, int64_t first,
         int64_t count, bool values, uintptr_t result, int64_t result_pitch, int threads, bool portable) {
        py::gil_scoped_release release;
        const saap::MovedRows rows{packed_rows(weight), address<const float>(up), address<const float>(down),
                                   down_pitch, rank};
        saap::moved_rows_f32(rows, first, count, values, address<float>(result), result_pitch, threads, portable);
      },
      py::arg("weight"), py::arg("up"), py::arg("down"), py::arg("down_pitch"), py::arg("rank"), py::arg("first"),
      py::arg("count"), py::arg("values"), py::arg("result"), py::arg("result_pitch"), py::arg("threads"),
      py::arg("portable") = false);
#ifdef SAAP_CUDA
  m.def(
      "cuda_versions",
      [] {
        const auto versions = saap::cuda_versions();
        return py::make_tuple(versions.driver, versions.runtime);
      },
      "CUDA version of the driver (0: none) and of the runtime this module is linked with, 1000 * major + 10 * minor.");
  m.def(
      "cuda_image_error",
      []() -> std::string {
        const int error = saap::cuda_image_error();
        return error == 0 ? "" : saap::cuda_error_string(error);
      },
      "Why the kernels cannot run on the current device; empty when they can.");
  m.def("activation_planes", [](uintptr_t x, int64_t x_pitch, uintptr_t dx, int64_t dx_pitch, uintptr_t shift,
                                uintptr_t blocks, int64_t block_count, uintptr_t starts, int64_t sequences,
                                int64_t features, std::array<int64_t, 5> slots, int64_t planes, int dtype,
                                uintptr_t partial, uintptr_t result, uintptr_t stream) {
    saap::ActivationPlanes a{address<const void>(x), x_pitch, address<const void>(dx), dx_pitch,
                             address<const float>(shift), address<const int32_t>(blocks), block_count,
                             address<const int32_t>(starts), sequences, features, {}, planes,
                             static_cast<saap::Dtype>(dtype), address<float>(partial), address<float>(result),
                             address<void>(stream)};
    std::copy(slots.begin(), slots.end(), a.slots);
    check(saap::activation_planes(a));
  });
  m.def("weight_salience_tile", [](int dtype) {
    const auto tile = saap::weight_salience_tile(static_cast<saap::Dtype>(dtype));
    return py::make_tuple(tile.entries, tile.tokens);
  });
  m.def("weight_salience", [](uintptr_t p, int64_t p_pitch, int64_t p_columns, uintptr_t q, int64_t q_pitch,
                              int64_t q_columns, uintptr_t w, int64_t w_stride_u, int64_t w_stride_r, int64_t lines,
                              int64_t entries, uintptr_t blocks, int64_t block_count, float scale, bool coupled,
                              std::array<int64_t, 3> slots, int64_t plane, int dtype, uintptr_t partial,
                              uintptr_t stream) {
    saap::WeightSalience a{address<const void>(p), p_pitch, p_columns, address<const void>(q), q_pitch, q_columns,
                           address<const void>(w), w_stride_u, w_stride_r, lines, entries,
                           address<const int32_t>(blocks), block_count, scale, coupled, {}, plane,
                           static_cast<saap::Dtype>(dtype), address<float>(partial), address<void>(stream)};
    std::copy(slots.begin(), slots.end(), a.slots);
    check(saap::weight_salience(a));
  });
  m.def("linear_decode_tile", [] {
    const auto tile = saap::linear_decode_tile();
    return py::make_tuple(tile.lines, tile.stage_bytes, tile.x_elements);
  });
  m.def("linear_decode", [](uintptr_t x, int64_t x_pitch, int tokens, uintptr_t weight, int64_t weight_pitch,
                            int64_t weight_half, int64_t rows, int columns, int bits, uintptr_t scale,
                            uintptr_t zero, int64_t scale_half, int group, int groups, int scale_dtype,
                            uintptr_t bias, int activation, int slices, int splits, uintptr_t partial,
                            uintptr_t result, int64_t result_pitch, int dtype, uintptr_t stream) {
    check(saap::linear_decode({address<const void>(x), x_pitch, tokens, address<const void>(weight), weight_pitch,
                               weight_half, rows, columns, bits, address<const void>(scale), address<const void>(zero),
                               scale_half, group, groups, static_cast<saap::Dtype>(scale_dtype),
                               address<const void>(bias), static_cast<saap::Activation>(activation), slices, splits,
                               address<float>(partial), address<void>(result), result_pitch,
                               static_cast<saap::Dtype>(dtype), address<void>(stream)}));
  });
#endif
}
