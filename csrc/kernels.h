// Declarations of every native kernel: raw pointers, sizes, pitches in elements, stream in, error code out.
#pragma once

#include <cstdint>

namespace saap {

// sums (3, units) += sums over each unit of |s|, s^2 and |s - s^2 / 2| with s = weight * gradient,
// both (rows, columns) fp32 with row pitches. axis 0: a unit is unit_size rows, axis 1: columns.
// The result does not depend on the number of threads.
void salience_reduce_f32(const float* gradient, int64_t gradient_pitch, const float* weight, int64_t weight_pitch,
                         int64_t rows, int64_t columns, int64_t unit_size, int axis, float* sums, int threads);

// mean += s and square += s^2 element by element, s = weight * gradient; mean and square are dense (rows, columns).
void coupled_accumulate_f32(const float* gradient, int64_t gradient_pitch, const float* weight, int64_t weight_pitch,
                            int64_t rows, int64_t columns, float* mean, float* square, int threads);

bool has_avx2();

struct ActivationSums {
  const float* x;  // (tokens, features) fp32
  int64_t x_pitch;
  const float* dx;  // like x; used for salience only
  int64_t dx_pitch;
  const int32_t* spans;  // (sequences, 2)
  int64_t sequences;
  int64_t features;
  const float* shift;  // (features,) or null for zero
  float* salience;     // (sequences, features) sums of x * dx, or null
  float* statistics;   // (3, sequences, features) sums of x - shift and its square, max |x|; or null
  int threads;
};

// Reads every operand once; the result does not depend on the number of threads.
void activation_sums_f32(const ActivationSums& arguments);

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

struct ActivationSalience {
  const void* y;
  int64_t y_pitch;
  const void* dy;
  int64_t dy_pitch;
  const int32_t* spans;  // (sequences, 2) on the device
  int64_t sequences;
  int64_t chunks;          // of rows_per_partial rows, enough for the longest span
  int64_t rows_per_partial;
  int64_t features;
  int64_t unit_size;
  Dtype dtype;
  float* partial;  // (sequences, chunks, features)
  float* result;   // (sequences, features / unit_size)
  void* stream;
};

// result = sum over each sequence's rows and each unit's features of y * dy. Returns a cudaError_t.
int activation_salience(const ActivationSalience& arguments);
const char* cuda_error_string(int error);

}  // namespace saap
