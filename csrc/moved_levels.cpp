// Quantised weights whose levels a low-rank change moves, as fp32: Q' = clamp(round(Q + (up down) / scale)).
#include <algorithm>
#include <cmath>

#include "packed_rows.h"

namespace saap {
namespace {

constexpr int64_t kTeamRows = 16;          // rows that share a tile of down in the first cache
constexpr int64_t kTileBlocks = 4;         // 256 columns, 16 KiB at rank 16

// Scale and zero of half a block; a group holds whole ones.
struct Half {
  float scale, zero;
};

template <Storage kStorage>
constexpr float lowest() { return kStorage == Storage::int8 ? -128.0f : 0.0f; }
template <Storage kStorage>
constexpr float highest() { return kStorage == Storage::int8 ? 127.0f : 15.0f; }

// Half a block of one row, kHalf results; down begins at its columns, values says whether scale and zero are applied.
using MoveHalf = void (*)(const uint8_t* block, bool upper, Half half, const float* up, const float* down,
                          int64_t down_pitch, int64_t rank, bool values, float* result);

template <Storage kStorage>
void move_half(const uint8_t* block, bool upper, Half half, const float* up, const float* down, int64_t down_pitch,
               int64_t rank, bool values, float* result) {
  for (int64_t i = 0; i < kHalf; ++i) {
    float moved = 0.0f;
    for (int64_t k = 0; k < rank; ++k) moved += up[k] * down[k * down_pitch + i];
    moved = half.scale > 0.0f ? moved / half.scale : 0.0f;
    const float level = std::rint(block_value<kStorage>(block, i + (upper ? kHalf : 0)) + moved);
    const float kept = std::min(std::max(level, lowest<kStorage>()), highest<kStorage>());
    result[i] = values ? half.scale * kept + half.zero : kept;
  }
}

#if defined(__x86_64__)
template <Storage kStorage>
SAAP_AVX2_F16C void move_half_wide(const uint8_t* block, bool upper, Half half, const float* up, const float* down,
                                   int64_t down_pitch, int64_t rank, bool values, float* result) {
  constexpr int kParts = kHalf / kLanes;
  __m256 moved[kParts] = {};
  for (int64_t k = 0; k < rank; ++k) {
    const __m256 factor = _mm256_broadcast_ss(up + k);
    for (int part = 0; part < kParts; ++part)
      moved[part] = _mm256_fmadd_ps(factor, _mm256_loadu_ps(down + k * down_pitch + kLanes * part), moved[part]);
  }
  const __m256 scale = _mm256_set1_ps(half.scale), zero = _mm256_set1_ps(half.zero);
  const __m256 constant = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_NGT_UQ);  // a group of one value: no steps
  for (int part = 0; part < kParts; ++part) {
    const __m256 q = upper ? block_part<kStorage>(block, part + kParts) : block_part<kStorage>(block, part);
    const __m256 steps = _mm256_andnot_ps(constant, _mm256_div_ps(moved[part], scale));
    __m256 level = _mm256_round_ps(_mm256_add_ps(q, steps), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    level = _mm256_max_ps(level, _mm256_set1_ps(lowest<kStorage>()));
    level = _mm256_min_ps(level, _mm256_set1_ps(highest<kStorage>()));
    _mm256_storeu_ps(result + kLanes * part, values ? _mm256_fmadd_ps(scale, level, zero) : level);
  }
}
#endif

MoveHalf move_function(Storage storage, bool wide) {
#if defined(__x86_64__)
  if (wide) return storage == Storage::int8 ? move_half_wide<Storage::int8> : move_half_wide<Storage::int4>;
#endif
  (void)wide;
  return storage == Storage::int8 ? move_half<Storage::int8> : move_half<Storage::int4>;
}

}  // namespace

void moved_rows_f32(const MovedRows& a, int64_t first, int64_t count, bool values, float* result, int64_t result_pitch,
                    int threads, bool portable) {
  const PackedRows& w = a.weight;
  const bool wide = has_avx2() && !portable;
  const MoveHalf move = move_function(w.storage, wide);
  const int64_t blocks = (w.columns + kBlock - 1) / kBlock, teams = (count + kTeamRows - 1) / kTeamRows;
  const int team = count * w.columns < kSerialElements ? 1 : std::max(1, threads);
  (void)team;  // unused without OpenMP
#pragma omp parallel num_threads(team)
  {
    Scales scales(w, kTeamRows);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < teams; ++t) {
      const int64_t start = t * kTeamRows, stop = std::min(start + kTeamRows, count);
      for (int64_t r = start; r < stop; ++r) scales.read(w, first + r, r - start, wide);
      for (int64_t tile = 0; tile < blocks; tile += kTileBlocks) {
        for (int64_t r = start; r < stop; ++r) {
          const uint8_t* data = w.data + (first + r) * w.pitch;
          for (int64_t half = 2 * tile; half < 2 * std::min(tile + kTileBlocks, blocks); ++half) {
            const int64_t group = half * kHalf / w.group_size;
            move(data + half / 2 * block_bytes(w.storage), half % 2,
                 {scales.scales(r - start)[group], scales.zeros(r - start)[group]}, a.up + (first + r) * a.rank,
                 a.down + half * kHalf, a.down_pitch, a.rank, values, result + r * result_pitch + half * kHalf);
          }
        }
      }
    }
  }
}

}  // namespace saap
