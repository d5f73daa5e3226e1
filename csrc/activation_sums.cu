// Sums over tokens of x * dx, x, x^2, |x| and max |x|: every operand is read once, in two ordered stages, no atomics.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"

namespace saap {
namespace {

constexpr int kThreads = 128, kAcross = 16, kDown = kThreads / kAcross;  // threads over features and over rows
constexpr int kSums = 5, kLargest = 3;                                  // in the order of slots

template <typename T>
constexpr int kVector = 16 / int(sizeof(T));

template <typename T, int V>
__device__ inline void load(float (&values)[V], const T* row, int valid) {
  if constexpr (V > 1) {
    const uint4 bits = load_streaming(row);
    const T* each = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = to_float(each[i]);
  } else {
    values[0] = valid > 0 ? to_float(row[0]) : 0.0f;
  }
}

// partial[plane, block, features]: each thread owns V neighbouring features and every kDown-th row of a token block.
template <typename T, int V, bool Salience, bool Statistics>
__global__ void __launch_bounds__(kThreads) sum_block(ActivationPlanes a) {
  const int64_t feature_blocks = (a.features + kAcross * V - 1) / (kAcross * V);
  const int64_t block = blockIdx.x / feature_blocks, start = blockIdx.x % feature_blocks * kAcross * V;
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const int64_t feature = start + across * V;
  const int valid = feature < a.features ? int(a.features - feature < V ? a.features - feature : V) : 0;
  float sums[kSums][V] = {}, about[V] = {};
  if (Statistics && a.shift != nullptr)
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < valid) about[i] = a.shift[feature + i];
  const int64_t first = a.blocks[5 * block], last = first + a.blocks[5 * block + 1];
  const T* x = static_cast<const T*>(a.x) + feature;
  const T* dx = static_cast<const T*>(a.dx) + feature;
  if (valid > 0) {
#pragma unroll 4
    for (int64_t row = first + down; row < last; row += kDown) {
      float values[V], gradients[V];
      load<T, V>(values, x + row * a.x_pitch, valid);
      if (Salience) load<T, V>(gradients, dx + row * a.dx_pitch, valid);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (Salience) sums[0][i] = fmaf(values[i], gradients[i], sums[0][i]);
        if (Statistics) {
          const float moved = values[i] - about[i];
          sums[1][i] += moved;
          sums[2][i] = fmaf(moved, moved, sums[2][i]);
          sums[kLargest][i] = fmaxf(sums[kLargest][i], fabsf(values[i]));
          sums[4][i] += fabsf(values[i]);
        }
      }
    }
  }
  float* rows = reinterpret_cast<float*>(dynamic_shared());  // [kDown][kAcross * V]
#pragma unroll
  for (int which = 0; which < kSums; ++which) {
    if ((which == 0 ? !Salience : !Statistics) || a.slots[which] < 0) continue;
    synchronise();
#pragma unroll
    for (int i = 0; i < V; ++i) rows[(down * kAcross + across) * V + i] = sums[which][i];
    synchronise();
    for (int column = threadIdx.x; column < kAcross * V && start + column < a.features; column += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int row = 0; row < kDown; ++row) {
        const float term = rows[row * kAcross * V + column];
        sum = which == kLargest ? fmaxf(sum, term) : sum + term;
      }
      a.partial[(a.slots[which] * a.block_count + block) * a.features + start + column] = sum;
    }
  }
}

// result[plane, sequence, features]: the blocks of each sequence in order.
__global__ void __launch_bounds__(kThreads) sum_sequence(ActivationPlanes a) {
  const int64_t feature_blocks = (a.features + kThreads - 1) / kThreads;
  const int64_t feature = blockIdx.x % feature_blocks * kThreads + threadIdx.x;
  const int64_t row = blockIdx.x / feature_blocks, plane = row / a.sequences, sequence = row % a.sequences;
  if (feature >= a.features) return;
  float sum = 0.0f;
  for (int64_t block = a.starts[sequence]; block < a.starts[sequence + 1]; ++block) {
    const float term = a.partial[(plane * a.block_count + block) * a.features + feature];
    sum = plane == a.slots[kLargest] ? fmaxf(sum, term) : sum + term;
  }
  a.result[row * a.features + feature] = sum;
}

inline bool is_wanted(int64_t slot) { return slot >= 0; }

// Whether every row starts on 16 bytes and holds whole vectors.
template <typename T>
bool vectors(const void* pointer, int64_t pitch, int64_t features) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && pitch % kVector<T> == 0 && features % kVector<T> == 0;
}

template <typename T, int V>
int run(const ActivationPlanes& a) {
  const bool salience = a.slots[0] >= 0, statistics = std::any_of(a.slots + 1, a.slots + kSums, is_wanted);
  const auto kernel = !salience    ? sum_block<T, V, false, true>
                      : statistics ? sum_block<T, V, true, true>
                                   : sum_block<T, V, true, false>;
  const int64_t blocks = (a.features + kAcross * V - 1) / (kAcross * V) * a.block_count;
  return launch(kernel, dim3(unsigned(blocks)), kThreads, kThreads * V * int(sizeof(float)), a.stream, a);
}

template <typename T>
int run(const ActivationPlanes& a) {
  const bool wide = vectors<T>(a.x, a.x_pitch, a.features) && (!a.dx || vectors<T>(a.dx, a.dx_pitch, a.features));
  const int error = wide ? run<T, kVector<T>>(a) : run<T, 1>(a);
  if (error != cudaSuccess || a.result == nullptr) return error;
  const int64_t rows = a.planes * a.sequences, blocks = (a.features + kThreads - 1) / kThreads * rows;
  return launch(sum_sequence, dim3(unsigned(blocks)), kThreads, 0, a.stream, a);
}

}  // namespace

int activation_planes(const ActivationPlanes& a) {
  switch (a.dtype) {
    case Dtype::f32: return run<float>(a);
    case Dtype::f16: return run<half>(a);
    case Dtype::bf16: return run<bfloat16>(a);
  }
  return cudaErrorInvalidValue;
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

CudaVersions cuda_versions() {
  CudaVersions versions{0, 0};
  cudaDriverGetVersion(&versions.driver);
  cudaRuntimeGetVersion(&versions.runtime);
  return versions;
}

int cuda_image_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(sum_sequence));
  cudaGetLastError();  // or the next launch would report this error
  return error;
}

}  // namespace saap
