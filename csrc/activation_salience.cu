// Signed activation salience: two ordered stages, no atomics, 16-byte loads where the layout allows.
#include "kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace saap {
namespace {

constexpr int kThreads = 128;

template <typename T>
constexpr int kVector = 16 / sizeof(T);

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// partial[s, chunk, features]: each thread owns V neighbouring features and walks the chunk's rows.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) sum_rows(ActivationSalience a) {
  const int64_t feature = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  const int64_t sequence = blockIdx.z, chunk = blockIdx.y;
  if (feature >= a.features) return;
  const int64_t stop = a.spans[2 * sequence + 1];
  const int64_t first = a.spans[2 * sequence] + chunk * a.rows_per_partial;
  const int64_t last = min(stop, first + a.rows_per_partial);
  const T* y = static_cast<const T*>(a.y);
  const T* dy = static_cast<const T*>(a.dy);
  float sums[V] = {};
  const int64_t valid = min(int64_t(V), a.features - feature);
  if (V > 1 && valid == V) {
    for (int64_t row = first; row < last; ++row) {
      const uint4 left = __ldcs(reinterpret_cast<const uint4*>(y + row * a.y_pitch + feature));
      const uint4 right = __ldcs(reinterpret_cast<const uint4*>(dy + row * a.dy_pitch + feature));
      const T* l = reinterpret_cast<const T*>(&left);
      const T* r = reinterpret_cast<const T*>(&right);
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] = fmaf(to_float(l[i]), to_float(r[i]), sums[i]);
    }
  } else {
    for (int64_t row = first; row < last; ++row) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (i < valid)
          sums[i] = fmaf(to_float(y[row * a.y_pitch + feature + i]), to_float(dy[row * a.dy_pitch + feature + i]), sums[i]);
    }
  }
  float* out = a.partial + (sequence * a.chunks + chunk) * a.features + feature;
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < valid) out[i] = sums[i];
}

// result[s, unit]: one warp per unit adds its features and chunks in a fixed order.
__global__ void __launch_bounds__(kThreads) sum_units(ActivationSalience a) {
  const int64_t units = a.features / a.unit_size;
  const int64_t unit = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t sequence = blockIdx.y;
  if (unit >= units) return;
  const int64_t terms = a.chunks * a.unit_size;
  float sum = 0.0f;
  for (int64_t term = threadIdx.x % 32; term < terms; term += 32) {
    const int64_t chunk = term / a.unit_size, inside = term % a.unit_size;
    sum += a.partial[(sequence * a.chunks + chunk) * a.features + unit * a.unit_size + inside];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) a.result[sequence * units + unit] = sum;
}

template <typename T>
bool aligned(const void* pointer, int64_t pitch) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && pitch * int64_t(sizeof(T)) % 16 == 0;
}

template <typename T>
int launch(const ActivationSalience& a) {
  const auto stream = static_cast<cudaStream_t>(a.stream);
  const bool wide = aligned<T>(a.y, a.y_pitch) && aligned<T>(a.dy, a.dy_pitch);
  const int64_t per_block = int64_t(kThreads) * (wide ? kVector<T> : 1);
  const dim3 grid(unsigned((a.features + per_block - 1) / per_block), unsigned(a.chunks), unsigned(a.sequences));
  if (wide)
    sum_rows<T, kVector<T>><<<grid, kThreads, 0, stream>>>(a);
  else
    sum_rows<T, 1><<<grid, kThreads, 0, stream>>>(a);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t units = a.features / a.unit_size, per_row = kThreads / 32;
  sum_units<<<dim3(unsigned((units + per_row - 1) / per_row), unsigned(a.sequences)), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

int activation_salience(const ActivationSalience& a) {
  switch (a.dtype) {
    case Dtype::f32: return launch<float>(a);
    case Dtype::f16: return launch<__half>(a);
    case Dtype::bf16: return launch<__nv_bfloat16>(a);
  }
  return cudaErrorInvalidValue;
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace saap
