// How a warp of linear_decode.cu multiplies its part of a stage.
#pragma once

#include "linear_decode_stage.cuh"

namespace saap {
namespace {

template <int Tiles>
using Sums = float[Tiles][Tiles][4];  // of tiles of rows and of tokens

// The scales and zeros of a stage. Whole: groups are of whole 128 columns, and each lane keeps those of its rows.
// Otherwise it keeps those of units inside and inside + 4, and all lanes get them from there.
template <typename T, int Bits, int Tiles, bool Whole>
struct Scales {
  static constexpr int kept = kStageColumns<Bits> / 128;
  uint32_t scale[Tiles][2][kept], zero[Tiles][2][kept];  // as they are stored, then as floats

  // Waits for the loads.
  __device__ void convert(bool wide) {
    if (wide) return;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
#pragma unroll
        for (int which = 0; which < kept; ++which) {
          scale[tile][upper][which] = as_bits(Pair<T>{scale[tile][upper][which]}.get(0));
          zero[tile][upper][which] = as_bits(Pair<T>{zero[tile][upper][which]}.get(0));
        }
  }

  __device__ static float get(const uint32_t (&values)[kept], const Place& at, int unit) {
    const uint32_t value = kept > 1 && unit >= 4 ? values[kept - 1] : values[0];
    return as_float(Whole ? value : shuffle(value, at.lane - at.inside + unit % 4));
  }
};

// Where a lane finds the scales it keeps, round after round: in fp32 (wide) or in T.
template <typename T, int Bits, int Tiles, bool Whole>
struct ScaleReader {
  using Kept = Scales<T, Bits, Tiles, Whole>;
  const char* rows[Tiles][2];
  int64_t to_zero;  // bytes from a scale to its zero
  int bytes;        // of each
  int group[Kept::kept], within[Kept::kept];  // of the first column of each, next
  int groups_on, columns_on;                  // to the next round

  __device__ ScaleReader(const LinearDecode& a, const Place& at, int round)
      : to_zero(static_cast<const char*>(a.zero) - static_cast<const char*>(a.scale)),
        bytes(a.scale_dtype == Dtype::f32 ? 4 : 2) {
    const int step = a.slices * kStageColumns<Bits>;
    groups_on = step / a.group, columns_on = step % a.group;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int line = tile * kTileLines + upper * 8 + at.group;
        const int64_t first = (is_up(a, line) ? a.scale_half : 0) + row_of(a, at, line) * a.groups;
        rows[tile][upper] = static_cast<const char*>(a.scale) + first * bytes;
      }
#pragma unroll
    for (int which = 0; which < Kept::kept; ++which) {
      const int unit = 4 * which + (Whole ? 0 : at.inside);
      const int column = round * step + at.slice * kStageColumns<Bits> + unit * kUnit;
      group[which] = column / a.group, within[which] = column % a.group;
    }
    keep(bytes);
  }

  __device__ void load_round(Kept& scales, const LinearDecode& a) {
#pragma unroll
    for (int which = 0; which < Kept::kept; ++which) {
      const int offset = (group[which] < a.groups ? group[which] : a.groups - 1) * bytes;  // beyond the row x is zero
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const char* scale = rows[tile][upper] + offset;
          scales.scale[tile][upper][which] = load_stored(scale, bytes == 4);
          scales.zero[tile][upper][which] = load_stored(scale + to_zero, bytes == 4);
        }
      group[which] += groups_on, within[which] += columns_on;
      if (within[which] >= a.group) ++group[which], within[which] -= a.group;
    }
  }
};

// sums += the products of one unit of a tile of rows with all tokens.
template <typename T, int Tiles>
__device__ inline void multiply_unit(float (&sums)[Tiles][4], const uint32_t (&low)[4], const uint32_t (&high)[4],
                                     const uint32_t (&tokens)[Tiles][4]) {
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    const uint32_t rows[4] = {low[e], high[e], low[e + 1], high[e + 1]};
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const uint32_t columns[2] = {tokens[tile][e], tokens[tile][e + 1]};
      multiply_add(sums[tile], rows, columns, T{});
    }
  }
}

// total += the products of a stage.
template <typename T, int Tiles>
__device__ inline void multiply_stage(Sums<Tiles>& total, const char* shared, int stage,
                                      const Reader<T, 16, Tiles>& reader) {
  uint32_t rows[Tiles][2][2][4], tokens[Tiles][4];
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) reader.load_rows(rows[tile], shared, stage, tile, 0);
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    reader.load_tokens(tokens, shared, stage, unit);
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
      multiply_unit<T>(total[tile], rows[tile][0][unit], rows[tile][1][unit], tokens);
  }
}

// part += scale * dots + zero * sums of the columns since the last time, which belong to the group of `unit`.
template <typename T, int Bits, int Tiles, bool Whole>
__device__ inline void end_group(Sums<Tiles>& part, Sums<Tiles>& dots, float (&sums)[Tiles][4], const Place& at,
                                 const Scales<T, Bits, Tiles, Whole>& scales, int unit) {
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const float scale = scales.get(scales.scale[tile][upper], at, unit);
      const float zero = scales.get(scales.zero[tile][upper], at, unit);
#pragma unroll
      for (int other = 0; other < Tiles; ++other)
#pragma unroll
        for (int e = 2 * upper; e < 2 * upper + 2; ++e) {
          const float dot = fmaf(-kOffset<T, Bits>, sums[other][e], dots[tile][other][e]);
          part[tile][other][e] = fmaf(scale, dot, fmaf(zero, sums[other][e], part[tile][other][e]));
          dots[tile][other][e] = 0.0f;
        }
    }
#pragma unroll
  for (int other = 0; other < Tiles; ++other)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[other][e] = 0.0f;
}

// total += the products of a stage by weights rounded to T: right for any x, and slow.
template <typename T, int Bits, int Tiles, bool Whole>
__device__ inline void multiply_dequantised(Sums<Tiles>& total, const char* shared, int stage, const Place& at,
                                            const Reader<T, Bits, Tiles>& reader,
                                            const Scales<T, Bits, Tiles, Whole>& scales) {
#pragma unroll 1
  for (int pair = 0; pair < kStageColumns<Bits> / (2 * kUnit); ++pair)
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      uint32_t rows[2][2][4], tokens[Tiles][4];
      reader.load_rows(rows, shared, stage, tile, pair);
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const float scale = scales.get(scales.scale[tile][upper], at, 2 * pair + unit);
          const float zero = scales.get(scales.zero[tile][upper], at, 2 * pair + unit);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            Pair<T> values{rows[upper][unit][e]};
            const float first = values.get(0) - kOffset<T, Bits>, second = values.get(1) - kOffset<T, Bits>;
            values.set(T(fmaf(scale, first, zero)), T(fmaf(scale, second, zero)));
            rows[upper][unit][e] = values.bits;
          }
        }
        reader.load_tokens(tokens, shared, stage, 2 * pair + unit);
        multiply_unit<T>(total[tile], rows[0][unit], rows[1][unit], tokens);
      }
    }
}

template <typename T, int Bits, int Tiles, bool Whole>
__device__ inline void multiply_stage(Sums<Tiles>& total, const LinearDecode& a, const char* shared, int stage,
                                      const Place& at, const Reader<T, Bits, Tiles>& reader,
                                      const Scales<T, Bits, Tiles, Whole>& scales) {
  Sums<Tiles> part = {}, dots = {};
  float sums[Tiles][4] = {};
  Pair<T> one;
  one.set(T(1.0f), T(1.0f));
  const uint32_t ones[4] = {one.bits, one.bits, one.bits, one.bits};
  const bool every_unit = !Whole && a.group % (2 * kUnit) != 0;
#pragma unroll
  for (int pair = 0; pair < kStageColumns<Bits> / (2 * kUnit); ++pair) {
    uint32_t rows[Tiles][2][2][4], tokens[Tiles][4];
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) reader.load_rows(rows[tile], shared, stage, tile, pair);
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      reader.load_tokens(tokens, shared, stage, 2 * pair + unit);
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
        multiply_unit<T>(dots[tile], rows[tile][0][unit], rows[tile][1][unit], tokens);
      multiply_unit<T>(sums, ones, ones, tokens);
      if (unit == 1 ? !Whole || pair % 2 == 1 : every_unit)
        end_group<T>(part, dots, sums, at, scales, 2 * pair + unit);
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
    multiply_dequantised<T>(total, shared, stage, at, reader, scales);
    return;
  }
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
    for (int other = 0; other < Tiles; ++other)
#pragma unroll
      for (int e = 0; e < 4; ++e) total[tile][other][e] += part[tile][other][e];
}

}  // namespace
}  // namespace saap
