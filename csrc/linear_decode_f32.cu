// x W' of 1 to 16 tokens in fp32: a warp owns a row, or a row of gate and of up, and every token. The correctness path.
#include "linear_decode.cuh"

namespace saap {
namespace {

constexpr int kWarps = 4;

// The values of a lane's 16 bytes and their first column: two runs of neighbours where low and high halves of bytes are.
template <int Bits>
struct Chunk {
  static constexpr int count = 128 / Bits, run = Bits == 4 ? 16 : count;
  float values[count];

  __device__ void load(const char* bytes) {
    const uint4 words = load_streaming(bytes);
    const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if constexpr (Bits == 32) {
        memcpy(&values[i], &each[i], 4);
      } else {
        const uint32_t byte = each[i % 16 / 4] >> 8 * (i % 4) & 0xff;
        values[i] = Bits == 8 ? float(int8_t(byte)) : float(byte >> i / 16 * 4 & 15);
      }
    }
  }
  __device__ static int64_t column(int64_t chunk, int i) {
    return Bits == 4 ? chunk / 2 * 64 + chunk % 2 * 16 + i / 16 * 32 + i % 16 : chunk * count + i;
  }
};

__device__ inline float load_scale(const void* values, int64_t index, Dtype dtype) {
  if (dtype == Dtype::f16) return to_float(static_cast<const half*>(values)[index]);
  if (dtype == Dtype::bf16) return to_float(static_cast<const bfloat16*>(values)[index]);
  return static_cast<const float*>(values)[index];
}

// The sums of one row of one half; lane t gets that of token t.
template <int Bits, int Tokens>
__device__ inline float multiply_row(const LinearDecode& a, int64_t half, int64_t row) {
  const int lane = threadIdx.x % 32;
  const char* weight = static_cast<const char*>(a.weight) + half * a.weight_half + row * a.weight_pitch;
  const float* x = static_cast<const float*>(a.x);
  float sums[Tokens] = {}, own = 0.0f;
  for (int64_t chunk = lane; chunk * 16 < a.weight_pitch; chunk += 32) {
    Chunk<Bits> weights;
    weights.load(weight + chunk * 16);
#pragma unroll
    for (int start = 0; start < weights.count; start += weights.run) {
      if (weights.column(chunk, start) >= a.columns) continue;
      float scale = 1.0f, zero = 0.0f;
      if constexpr (Bits != 32) {  // a run lies in one group
        const int64_t index = half * a.scale_half + row * a.groups + int(weights.column(chunk, start)) / a.group;
        scale = load_scale(a.scale, index, a.scale_dtype), zero = load_scale(a.zero, index, a.scale_dtype);
      }
#pragma unroll
      for (int i = start; i < start + weights.run; ++i) {
        const int64_t column = weights.column(chunk, i);
        if (column >= a.columns) continue;
        const float value = Bits == 32 ? weights.values[i] : fmaf(scale, weights.values[i], zero);
#pragma unroll
        for (int token = 0; token < Tokens; ++token)
          if (token < a.tokens) sums[token] = fmaf(value, x[token * a.x_pitch + column], sums[token]);
      }
    }
  }
#pragma unroll
  for (int token = 0; token < Tokens; ++token) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sums[token] += shuffle_xor(sums[token], mask);
    if (lane == token) own = sums[token];
  }
  return own;
}

template <int Bits, int Tokens>
__global__ void __launch_bounds__(kWarps * 32) linear_decode_f32_kernel(LinearDecode a) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= (is_gated(a) ? a.result_pitch : a.rows)) return;  // with its warp
  const float sum = row < a.rows ? multiply_row<Bits, Tokens>(a, 0, row) : 0.0f;
  const float up = row < a.rows && is_gated(a) ? multiply_row<Bits, Tokens>(a, 1, row) : 0.0f;
  if (threadIdx.x % 32 < a.tokens) store_result<float>(a, threadIdx.x % 32, row, sum, up);
}

template <int Bits>
int run(const LinearDecode& a) {
  const int64_t extent = a.activation == Activation::none ? a.rows : a.result_pitch;
  const dim3 grid(unsigned((extent + kWarps - 1) / kWarps));
  const auto kernel = a.tokens > 4 ? linear_decode_f32_kernel<Bits, 16> : linear_decode_f32_kernel<Bits, 4>;
  return launch(kernel, grid, kWarps * 32, 0, a.stream, a);
}

}  // namespace

int linear_decode_f32(const LinearDecode& a) {
  return a.bits == 16 ? run<32>(a) : a.bits == 8 ? run<8>(a) : run<4>(a);
}

}  // namespace saap
