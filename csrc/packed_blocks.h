// Blocks of 64 weights of one row, as saap_kernels/packed.py lays them out, to fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define SAAP_AVX2_F16C __attribute__((target("avx2,fma,f16c")))
#define SAAP_AVX2_F16C_INLINE SAAP_AVX2_F16C __attribute__((always_inline)) inline
#endif

namespace saap {

constexpr int64_t kBlock = 64;  // weights; those of an int4 block's low halves come first, then those of its high ones
constexpr int64_t kHalf = kBlock / 2;

constexpr bool is_quantised(Storage storage) { return storage == Storage::int8 || storage == Storage::int4; }

constexpr int64_t block_bytes(Storage storage) {
  return storage == Storage::f32 ? 4 * kBlock
                                 : (storage == Storage::int8 ? kBlock : storage == Storage::int4 ? kHalf : 2 * kBlock);
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest < 0x400u) return float_of_bits(sign | 0x3f800000u) * (static_cast<float>(rest) * 0x1p-24f);
  return float_of_bits(sign | (rest >= 0x7c00u ? 0x7f800000u | rest << 13 : (rest << 13) + (112u << 23)));
}

// Weight i of a block, before scale and zero.
template <Storage kStorage>
float block_value(const uint8_t* block, int64_t i) {
  if (kStorage == Storage::int4) return static_cast<float>(i < kHalf ? block[i] & 15 : block[i - kHalf] >> 4);
  if (kStorage == Storage::int8) return static_cast<float>(reinterpret_cast<const int8_t*>(block)[i]);
  if (kStorage == Storage::f32) return reinterpret_cast<const float*>(block)[i];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(block)[i];
  return kStorage == Storage::f16 ? float_of_half(bits) : float_of_bits(uint32_t(bits) << 16);
}

#if defined(__x86_64__)
// Weights 8 * part to 8 * part + 7 of a block, before scale and zero.
template <Storage kStorage>
SAAP_AVX2_F16C_INLINE __m256 block_part(const uint8_t* block, int part) {
  if (kStorage == Storage::int4) {
    const auto* bytes = reinterpret_cast<const __m128i*>(block + 8 * (part % 4));
    const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes));
    const __m256i half = part < 4 ? _mm256_and_si256(both, _mm256_set1_epi32(15)) : _mm256_srli_epi32(both, 4);
    return _mm256_cvtepi32_ps(half);
  }
  if (kStorage == Storage::int8) {
    const auto* bytes = reinterpret_cast<const __m128i*>(block + 8 * part);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes)));
  }
  if (kStorage == Storage::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(block) + 8 * part);
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 16 * part));
  if (kStorage == Storage::f16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

struct Pair {
  __m256 low, high;
};

constexpr float kMiddle = 8.0f, kHighFactor = 16.0f;

// Weights 8 * part to 8 * part + 7 of either half of a block, part < 4; for int4 they are Q - kMiddle, whose products
// with x cancel less than those of Q, and in the high half kHighFactor times that, which saves shifts.
template <Storage kStorage>
SAAP_AVX2_F16C_INLINE Pair block_pair(const uint8_t* block, int part) {
  if (kStorage != Storage::int4) return {block_part<kStorage>(block, part), block_part<kStorage>(block, part + 4)};
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(block + 8 * part)));
  const __m256i both = _mm256_or_si256(bytes, _mm256_castps_si256(_mm256_set1_ps(0x1p23f)));  // the float 2^23 + byte
  const __m256 low = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(~0xf0)));
  const __m256 high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(~0x0f)));
  return {_mm256_sub_ps(low, _mm256_set1_ps(0x1p23f + kMiddle)),
          _mm256_sub_ps(high, _mm256_set1_ps(0x1p23f + kMiddle * kHighFactor))};
}
#endif

}  // namespace saap
