// Packed weights to fp32: of one row and a few blocks for kernels, of whole rows for a library's GEMM.
#include <algorithm>

#include "packed_rows.h"

namespace saap {
namespace {

template <Storage kStorage>
void unpack(const PackedRows& w, int64_t row, int64_t block, int64_t blocks, const float* scale, const float* zero,
            const uint8_t*, float* result) {
  const uint8_t* data = w.data + row * w.pitch;
  for (int64_t b = block; b < block + blocks; ++b) {
    for (int64_t i = 0; i < kBlock; ++i) {
      const float value = block_value<kStorage>(data + b * block_bytes(kStorage), i);
      const int64_t group = is_quantised(kStorage) ? (b * kBlock + i) / w.group_size : 0;
      *result++ = is_quantised(kStorage) ? scale[group] * value + zero[group] : value;
    }
  }
}

void read_scales(const void* values, Dtype dtype, int64_t first, int64_t count, float* result) {
  if (dtype == Dtype::f32) {
    std::copy_n(static_cast<const float*>(values) + first, count, result);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(values) + first;
  for (int64_t i = 0; i < count; ++i)
    result[i] = dtype == Dtype::f16 ? float_of_half(bits[i]) : float_of_bits(uint32_t(bits[i]) << 16);
}

#if defined(__x86_64__)
SAAP_AVX2_F16C void read_half_scales(const uint16_t* values, int64_t count, float* result) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    _mm256_storeu_ps(result + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i))));
  for (; i < count; ++i) result[i] = float_of_half(values[i]);
}

template <Storage kStorage>
SAAP_AVX2_F16C void unpack_wide(const PackedRows& w, int64_t row, int64_t block, int64_t blocks, const float* scale,
                                const float* zero, const uint8_t* next, float* result) {
  const uint8_t* data = w.data + row * w.pitch + block * block_bytes(kStorage);
  int64_t group = -1, end = 0;  // of the half block before, and the weight its group ends at
  __m256 s = _mm256_setzero_ps(), z = s;
  for (int64_t half = 2 * block; half < 2 * (block + blocks); ++half, result += kHalf) {
    if (is_quantised(kStorage) && half * kHalf >= end) {
      group = half * kHalf / w.group_size;
      end = (group + 1) * w.group_size;
      s = _mm256_set1_ps(scale[group]);
      z = _mm256_set1_ps(zero[group]);
    }
    if (half % 2 == 0) {
      for (int64_t line = 0; line < block_bytes(kStorage); line += 64) __builtin_prefetch(next + line);
      next += block_bytes(kStorage);
    }
    for (int part = 0; part < 4; ++part) {
      __m256 value = half % 2 ? block_part<kStorage>(data, part + 4) : block_part<kStorage>(data, part);
      if (is_quantised(kStorage)) value = _mm256_fmadd_ps(s, value, z);
      _mm256_storeu_ps(result + kLanes * part, value);
    }
    if (half % 2) data += block_bytes(kStorage);
  }
}
#endif

template <Storage kStorage>
Unpack chosen(bool wide) {
#if defined(__x86_64__)
  if (wide) return unpack_wide<kStorage>;
#endif
  (void)wide;
  return unpack<kStorage>;
}

}  // namespace

void Scales::read(const PackedRows& w, int64_t row, int64_t slot, bool wide) {
  if (!is_quantised(w.storage)) return;
  const void* sources[] = {w.scale, w.zero};
  float* targets[] = {scale.data() + slot * pitch, zero.data() + slot * pitch};
  for (int i = 0; i < 2; ++i) {
#if defined(__x86_64__)
    if (wide && w.scale_dtype == Dtype::f16) {
      read_half_scales(static_cast<const uint16_t*>(sources[i]) + row * w.groups, w.groups, targets[i]);
      continue;
    }
#endif
    read_scales(sources[i], w.scale_dtype, row * w.groups, w.groups, targets[i]);
  }
  (void)wide;
}

Unpack unpack_function(Storage storage, bool wide) {
  switch (storage) {
    case Storage::f32: return chosen<Storage::f32>(wide);
    case Storage::f16: return chosen<Storage::f16>(wide);
    case Storage::bf16: return chosen<Storage::bf16>(wide);
    case Storage::int8: return chosen<Storage::int8>(wide);
    default: return chosen<Storage::int4>(wide);
  }
}

void unpack_rows_f32(const PackedRows& weight, int64_t first, int64_t count, float* result, int64_t result_pitch,
                     int threads, bool portable) {
  const bool wide = has_avx2() && !portable;
  const Unpack unpack = unpack_function(weight.storage, wide);
  const int64_t blocks = (weight.columns + kBlock - 1) / kBlock;
  const int team = count * weight.columns < kSerialElements ? 1 : std::max(1, threads);
  (void)team;  // unused without OpenMP
#pragma omp parallel num_threads(team)
  {
    Scales scales(weight, 1);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; ++r) {
      scales.read(weight, first + r, 0, wide);
      const uint8_t* next = weight.data + (first + r + 1) * weight.pitch;
      unpack(weight, first + r, 0, blocks, scales.scales(0), scales.zeros(0), next, result + r * result_pitch);
    }
  }
}

}  // namespace saap
