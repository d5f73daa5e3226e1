// What the kernels of linear_decode*.cu share: the end of every result, and the second stage of split sums.
#pragma once

#include <cmath>

#include "device.cuh"
#include "kernels.h"

namespace saap {

__device__ inline bool is_gated(const LinearDecode& a) { return a.activation != Activation::none; }

__device__ inline float activate(float gate, Activation activation) {
  if (activation == Activation::silu) return gate / (1.0f + expf(-gate));
  const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);  // sqrt(2 / pi)
  return 0.5f * gate * (1.0f + tanhf(inner));
}

// One element of the result from its sum, or from those of gate and up; zero beyond the rows.
template <typename T>
__device__ inline void store_result(const LinearDecode& a, int64_t token, int64_t row, float sum, float up) {
  T* result = static_cast<T*>(a.result) + token * a.result_pitch + row;
  const T* bias = static_cast<const T*>(a.bias);
  if (row >= a.rows) {
    *result = T(0.0f);
    return;
  }
  if (bias != nullptr) sum += to_float(bias[row]);
  if (is_gated(a)) {
    if (bias != nullptr) up += to_float(bias[a.rows + row]);
    sum = activate(sum, a.activation) * up;
  }
  *result = T(sum);
}

__device__ inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
__device__ inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// The bits of a scale or zero in fp32 (wide) or in 16 bits. Their conversion, later, waits for the load.
__device__ inline uint32_t load_stored(const char* address, bool wide) {
  if (wide) return *reinterpret_cast<const uint32_t*>(address);
  return *reinterpret_cast<const uint16_t*>(address);
}

int linear_decode_f32(const LinearDecode& arguments);

}  // namespace saap
