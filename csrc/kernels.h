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

bool has_avx2();  // and FMA and F16C, which every processor with AVX2 has

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
  float* statistics;   // (4, sequences, features) sums of x - shift and its square, max |x|, sum of |x|; or null
  int threads;
};

// Reads every operand once; the result does not depend on the number of threads.
void activation_sums_f32(const ActivationSums& arguments);

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// How a weight is stored: the first three as in Dtype; saap_kernels/packed.py lays out the others.
enum class Storage : int { f32 = 0, f16 = 1, bf16 = 2, int8 = 3, int4 = 4 };

// Rows of a packed weight, (2,) N' of them, N' a multiple of 64; quantised ones are scale * Q + zero by group.
struct PackedRows {
  const uint8_t* data;
  int64_t pitch;  // bytes from row to row
  int64_t columns;
  Storage storage;
  const void* scale;  // (rows, groups), as zero; null for weights that are not quantised
  const void* zero;
  Dtype scale_dtype;
  int64_t group_size, groups;  // a multiple of 32; ceil(columns / group_size)
};

enum class Activation : int { none = 0, silu = 1, gelu_tanh = 2 };

struct PackedLinear {
  PackedRows weight;
  int64_t rows;    // N, or F of gate and up
  int64_t stride;  // rows from a gate's row to its up projection's; used with an activation only
  const float* x;  // (tokens, columns rounded up to 64), zero beyond columns
  int64_t x_pitch, tokens;
  const float* bias;  // (rows,), with an activation (2, rows); or null
  Activation activation;
  float* result;         // (tokens, rows)
  int64_t result_pitch;  // with an activation the columns from rows to it are set to zero
  int threads;
  bool portable;  // leave AVX2 alone, whatever the processor has
};

// x W' + b, or activation(x Wg' + bg) * (x Wu' + bu); the weight is read once, the result does not depend on the
// number of threads.
void packed_linear_f32(const PackedLinear& arguments);

// Rows first to first + count as fp32, up to columns rounded up to 64; what is beyond columns means nothing.
void unpack_rows_f32(const PackedRows& weight, int64_t first, int64_t count, float* result, int64_t result_pitch,
                     int threads, bool portable);

// A low-rank change of the levels of a quantised weight: Q' = Q + up down / scale, rounded, kept within its bits.
struct MovedRows {
  PackedRows weight;
  const float* up;    // (rows, rank)
  const float* down;  // (rank, columns rounded up to 64)
  int64_t down_pitch, rank;
};

// Rows first to first + count of it as fp32, scale * Q' + zero if ``values``, else Q'; columns as unpack_rows_f32.
void moved_rows_f32(const MovedRows& arguments, int64_t first, int64_t count, bool values, float* result,
                    int64_t result_pitch, int threads, bool portable);

// A schedule of token blocks is (blocks, 5) int32 on the device: first row, rows, sequence at its last block (else -1).
struct ActivationPlanes {
  const void* x;  // (tokens, features)
  int64_t x_pitch;
  const void* dx;  // like x, or null
  int64_t dx_pitch;
  const float* shift;     // (features,) or null for zero
  const int32_t* blocks;  // the schedule
  int64_t block_count;
  const int32_t* starts;  // (sequences + 1,) the first block of each
  int64_t sequences;
  int64_t features;
  int64_t slots[5];  // planes of x * dx, x - shift, its square, max |x| and |x|, or -1
  int64_t planes;
  Dtype dtype;
  float* partial;  // (planes, blocks, features)
  float* result;   // (planes, sequences, features), or null if every sequence is one block: partial is the result
  void* stream;
};

// Sums over each sequence's rows, every operand read once. Returns a cudaError_t.
int activation_planes(const ActivationPlanes& arguments);

struct WeightSalience {
  const void* p;  // (tokens, p_columns) the operand on the units' side; rows of 16 bytes
  int64_t p_pitch;
  int64_t p_columns;
  const void* q;  // (tokens, q_columns) the other one
  int64_t q_pitch;
  int64_t q_columns;
  const void* w;  // element (line, entry) at line * w_stride_u + entry * w_stride_r
  int64_t w_stride_u;
  int64_t w_stride_r;
  int64_t lines;    // of units
  int64_t entries;  // summed
  const int32_t* blocks;  // the schedule, in blocks of WeightSalienceTile::tokens
  int64_t block_count;
  float scale;
  bool coupled;
  int64_t slots[3];  // planes of |s|, s^2 and |s - s^2 / 2| divided by scale, or -1
  int64_t plane;     // elements of one plane of partial
  Dtype dtype;
  float* partial;  // (planes, sequences, tiles of entries, lines); coupled: one sequence, of means times sequences
  void* stream;
};

struct WeightSalienceTile {
  int64_t entries, tokens;
};

WeightSalienceTile weight_salience_tile(Dtype dtype);

// Sums over the entries of each tile of f(w * (P'Q) of each sequence). Returns a cudaError_t.
int weight_salience(const WeightSalience& arguments);

// One product of 1 to 16 tokens with a packed weight (saap_kernels/packed.py), or a gate's and an up projection's.
struct LinearDecode {
  const void* x;  // (tokens, columns)
  int64_t x_pitch;
  int tokens;
  const void* weight;  // (halves, rows and their padding, weight_pitch), zeros beyond rows and columns
  int64_t weight_pitch;  // bytes, whole 16
  int64_t weight_half;   // bytes from a gate's row to the up projection's
  int64_t rows;
  int columns;
  int bits;           // 16: of dtype; 8 and 4: scale * q + zero
  const void* scale;  // (halves, rows and their padding, groups) of scale_dtype, or null
  const void* zero;
  int64_t scale_half;  // elements from a gate's row to the up projection's
  int group;           // columns, a multiple of 32
  int groups;
  Dtype scale_dtype;
  const void* bias;       // (halves, rows) of dtype, or null
  Activation activation;  // none: there is no up projection
  int slices;             // 16-bit dtypes: warps that share a row's columns, 1, 2, 4 or 8
  int splits;             // 16-bit dtypes: blocks that do
  float* partial;         // (splits, halves, tokens, rows), used for several splits
  void* result;           // (tokens, rows); of a gated product with zeros up to the pitch, a multiple of 64
  int64_t result_pitch;
  Dtype dtype;
  void* stream;
};

struct LinearDecodeTile {
  int64_t lines;        // weight rows of a block times slices
  int64_t stage_bytes;  // of a weight row that a warp multiplies at a time
  int64_t x_elements;   // at most tokens * slices * columns of a stage
};

LinearDecodeTile linear_decode_tile();

// result = x W' + bias, or act(x Wg' + bias) * (x Wu' + bias); ordered sums, no atomics. Returns a cudaError_t.
int linear_decode(const LinearDecode& arguments);
const char* cuda_error_string(int error);

struct CudaVersions {
  int driver, runtime;  // 1000 * major + 10 * minor; driver is 0 where there is none
};

// What the driver supports, and the runtime that this module is linked with. Works without a driver.
CudaVersions cuda_versions();

// Whether this module has code for the current device: all kernels have the same targets. Returns a cudaError_t.
int cuda_image_error();

}  // namespace saap
