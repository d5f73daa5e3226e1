// How a warp of linear_decode.cu multiplies its part of a stage.
#pragma once

#include "linear_decode_stage.cuh"

namespace saap {

// Of the stage that a warp multiplies in a round.
template <int Bits>
__device__ inline int first_column(const LinearDecode& a, const Place& at, int64_t round) {
  return int(round * a.slices + at.slice) * kStageColumns<Bits>;
}

// What a lane keeps of the scales and zeros of a stage: groups inside and inside + 4 of its rows; loaded a round ahead.
template <int Bits, int Tiles>
struct Scales {
  static constexpr int kept = kStageColumns<Bits> > 4 * kUnit ? 2 : 1;
  uint32_t scale[Tiles][2][kept], zero[Tiles][2][kept];

  __device__ void load(const LinearDecode& a, const Place& at, int column) {
    const int first = column / a.group, end = column + kStageColumns<Bits>;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int line = tile * kTileLines + upper * 8 + at.group;
        const int64_t row = row_of(a, at, line), last = a.rows - 1;
        const int64_t start = (is_up(a, line) ? a.scale_half : 0) + (row < last ? row : last) * a.groups;
#pragma unroll
        for (int which = 0; which < kept; ++which) {
          const int group = first + at.inside + 4 * which;
          const bool needed = group < a.groups && int64_t(group) * a.group < end;
          scale[tile][upper][which] = needed ? load_stored(a.scale, start + group, a.scale_dtype) : 0;
          zero[tile][upper][which] = needed ? load_stored(a.zero, start + group, a.scale_dtype) : 0;
        }
      }
  }

  // Of a tile's upper or lower row, from the lane that keeps group `index` of the stage.
  __device__ static float get(const uint32_t (&stored)[kept], const Place& at, int index, Dtype dtype) {
    const uint32_t wanted = kept > 1 && index >= 4 ? stored[kept - 1] : stored[0];
    return from_stored(shuffle(wanted, at.lane - at.inside + index % 4), dtype);
  }
};

template <typename T, int Bits, int Tiles>
struct Stage {
  const char* weight;  // the warp's lines
  const char* x;
  int chunks;         // of a token's row
  int column;         // the warp's first

  __device__ Stage(const LinearDecode& a, const Place& at, const char* bytes, int64_t round)
      : weight(bytes + at.warp * kTileLines * Tiles * kStageBytes),
        x(bytes + kWeightBytes),
        chunks(int(a.slices) * kStageColumns<Bits> / 8),
        column(first_column<Bits>(a, at, round)) {}

  __device__ void load_rows(uint32_t (&units)[2][2][4], const Place& at, int tile, int pair) const {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const char* line = weight + (tile * kTileLines + upper * 8 + at.group) * kStageBytes;
      load_units<T, Bits>(units[upper], line, at.group, pair, at.inside);
    }
  }

  __device__ void load_tokens(uint32_t (&words)[Tiles][4], const LinearDecode& a, const Place& at, int unit) const {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const int token = tile * 8 + at.group;
      const int chunk = at.slice * (kStageColumns<Bits> / 8) + 4 * unit + at.inside;
      uint4 loaded{0, 0, 0, 0};
      if (token < a.tokens) loaded = *reinterpret_cast<const uint4*>(x + (token * chunks + swizzled(token, chunk)) * 16);
      words[tile][0] = loaded.x, words[tile][1] = loaded.y, words[tile][2] = loaded.z, words[tile][3] = loaded.w;
    }
  }
};

template <int Tiles>
using Sums = float[Tiles][Tiles][4];  // of tiles of rows and of tokens

// sums += the products of one unit of a tile of rows with all tokens.
template <typename T, int Tiles>
__device__ inline void multiply_unit(float (&sums)[Tiles][4], const uint32_t (&low)[4], const uint32_t (&high)[4],
                                     const uint32_t (&tokens)[Tiles][4]) {
#pragma unroll
  for (int half_unit = 0; half_unit < 4; half_unit += 2) {
    const uint32_t rows[4] = {low[half_unit], high[half_unit], low[half_unit + 1], high[half_unit + 1]};
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const uint32_t columns[2] = {tokens[tile][half_unit], tokens[tile][half_unit + 1]};
      multiply_add(sums[tile], rows, columns, T{});
    }
  }
}

template <typename T, int Tiles>
__device__ inline void multiply_stage(Sums<Tiles>& total, const LinearDecode& a, const Place& at,
                                      const Stage<T, 16, Tiles>& stage) {
  uint32_t rows[Tiles][2][2][4], tokens[Tiles][4];
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) stage.load_rows(rows[tile], at, tile, 0);
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    stage.load_tokens(tokens, a, at, unit);
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
      multiply_unit<T>(total[tile], rows[tile][0][unit], rows[tile][1][unit], tokens);
  }
}

// part += scale * dots + zero * sums of a group that ends here, or of its part in this stage.
template <int Bits, int Tiles>
__device__ inline void end_group(Sums<Tiles>& part, Sums<Tiles>& dots, float (&sums)[Tiles][4], const LinearDecode& a,
                                 const Place& at, const Scales<Bits, Tiles>& scales, int index) {
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const float scale = scales.get(scales.scale[tile][upper], at, index, a.scale_dtype);
      const float zero = scales.get(scales.zero[tile][upper], at, index, a.scale_dtype);
#pragma unroll
      for (int other = 0; other < Tiles; ++other)
#pragma unroll
        for (int e = 2 * upper; e < 2 * upper + 2; ++e) {
          part[tile][other][e] = fmaf(scale, dots[tile][other][e], fmaf(zero, sums[other][e], part[tile][other][e]));
          dots[tile][other][e] = 0.0f;
        }
    }
#pragma unroll
  for (int other = 0; other < Tiles; ++other)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[other][e] = 0.0f;
}

// total += the products of a stage by weights rounded to T: right for any x, and slow.
template <typename T, int Bits, int Tiles>
__device__ inline void multiply_dequantised(Sums<Tiles>& total, const LinearDecode& a, const Place& at,
                                            const Stage<T, Bits, Tiles>& stage, const Scales<Bits, Tiles>& scales) {
  const int first = stage.column / a.group;
#pragma unroll 1
  for (int pair = 0; pair < kStageColumns<Bits> / (2 * kUnit); ++pair) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      uint32_t rows[2][2][4], tokens[Tiles][4];
      stage.load_rows(rows, at, tile, pair);
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        const int index = (stage.column + (2 * pair + unit) * kUnit) / a.group - first;
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const float scale = scales.get(scales.scale[tile][upper], at, index, a.scale_dtype);
          const float zero = scales.get(scales.zero[tile][upper], at, index, a.scale_dtype);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            Pair<T> values{rows[upper][unit][e]};
            values.set(T(fmaf(scale, values.get(0), zero)), T(fmaf(scale, values.get(1), zero)));
            rows[upper][unit][e] = values.bits;
          }
        }
        stage.load_tokens(tokens, a, at, 2 * pair + unit);
        multiply_unit<T>(total[tile], rows[0][unit], rows[1][unit], tokens);
      }
    }
  }
}

template <typename T, int Bits, int Tiles>
__device__ inline void multiply_stage(Sums<Tiles>& total, const LinearDecode& a, const Place& at,
                                      const Stage<T, Bits, Tiles>& stage, const Scales<Bits, Tiles>& scales) {
  constexpr int pairs = kStageColumns<Bits> / (2 * kUnit);
  Sums<Tiles> part = {}, dots = {};
  float sums[Tiles][4] = {};
  Pair<T> one;
  one.set(T(1.0f), T(1.0f));
  const uint32_t ones[4] = {one.bits, one.bits, one.bits, one.bits};
  int left = a.group - stage.column % a.group;  // columns of the group
  int index = 0;
#pragma unroll 1
  for (int pair = 0; pair < pairs; ++pair) {
    uint32_t rows[Tiles][2][2][4], tokens[Tiles][4];
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) stage.load_rows(rows[tile], at, tile, pair);
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      stage.load_tokens(tokens, a, at, 2 * pair + unit);
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
        multiply_unit<T>(dots[tile], rows[tile][0][unit], rows[tile][1][unit], tokens);
      multiply_unit<T>(sums, ones, ones, tokens);
      left -= kUnit;
      if (left == 0 || (unit == 1 && pair == pairs - 1)) {
        end_group(part, dots, sums, a, at, scales, index++);
        left = a.group;
      }
    }
  }
  bool defined = true;
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
    for (int other = 0; other < Tiles; ++other)
#pragma unroll
      for (int e = 0; e < 4; ++e) defined &= fabsf(part[tile][other][e]) <= 3.402823466e38f;
  if (any_lane(!defined)) {
    multiply_dequantised(total, a, at, stage, scales);
    return;
  }
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
    for (int other = 0; other < Tiles; ++other)
#pragma unroll
      for (int e = 0; e < 4; ++e) total[tile][other][e] += part[tile][other][e];
}

}  // namespace saap
