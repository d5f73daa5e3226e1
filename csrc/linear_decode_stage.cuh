// A stage of linear_decode.cu in shared memory: how weight and tokens get there, and how lanes read their fragments.
#pragma once

#include "linear_decode.cuh"

namespace saap {

constexpr int kLines = 128, kStageBytes = 128, kStages = 4;
constexpr int kWeightBytes = kLines * kStageBytes, kElements = 4096;  // of a stage: the weight's bytes, x at most
constexpr int kTileLines = 16, kUnit = 32;

template <int Bits>
constexpr int kStageColumns = kStageBytes * 8 / Bits;

// Tiles: of rows that a warp owns, and of tokens.
template <int Tiles>
constexpr int kThreads = kLines / (kTileLines * Tiles) * 32;

// 16-byte chunk of a row of shared memory, so that neighbouring rows' reads of 64 bytes or four rows' of 32 meet
// different banks.
__device__ inline int swizzled(int row, int chunk) { return chunk ^ ((row & 1) << 2 | (row & 2)); }

// Where a warp and a lane stand.
struct Place {
  int lane, group, inside;  // rows group and group + 8 of a tile, token group; columns 8 inside to 8 inside + 7
  int warp, slice;
  int line;     // of the block, the warp's first
  int64_t row;  // of the weight, the block's first
};

// A tile's 16 lines are neighbouring rows, or 8 of the gate and the same 8 of the up projection.
__device__ inline int64_t row_of(const LinearDecode& a, const Place& at, int line) {
  const int of_block = at.line + line;
  return at.row + (is_gated(a) ? of_block / kTileLines * 8 + of_block % 8 : of_block);
}
__device__ inline bool is_up(const LinearDecode& a, int line) { return is_gated(a) && line / 8 % 2; }

template <int Tiles>
__device__ inline void copy_weight(const LinearDecode& a, const Place& at, char* stage, int64_t round) {
  const int chunk = at.lane % 8;
  const int64_t byte = (round * a.slices + at.slice) * kStageBytes + chunk * 16;
#pragma unroll
  for (int first = 0; first < kTileLines * Tiles; first += 4) {
    const int line = first + at.lane / 8;
    const int64_t row = row_of(a, at, line);
    const bool inside = row < a.rows && byte < a.weight_pitch;
    const char* from = static_cast<const char*>(a.weight);
    if (inside) from += (is_up(a, line) ? a.weight_half : 0) + row * a.weight_pitch + byte;
    const int of_stage = at.warp * kTileLines * Tiles + line;
    copy_async_once(stage + of_stage * kStageBytes + swizzled(line, chunk) * 16, from, inside ? 16 : 0);
  }
}

// The columns of one round, zeros beyond the last: what lies there is not x.
template <typename T, int Threads>
__device__ inline void copy_x(const LinearDecode& a, char* stage, int64_t round, int chunks) {
  const T* x = static_cast<const T*>(a.x);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && (a.tokens == 1 || a.x_pitch % 8 == 0);
  const int chunk = int(threadIdx.x) % chunks;
  const int64_t left = a.columns - (round * chunks + chunk) * 8;
  const int valid = left < 0 ? 0 : left < 8 ? int(left) : 8;
  for (int token = int(threadIdx.x) / chunks; token < a.tokens; token += Threads / chunks) {
    char* to = stage + (token * chunks + swizzled(token, chunk)) * 16;
    const T* from = valid > 0 ? x + token * a.x_pitch + (round * chunks + chunk) * 8 : x;
    if (aligned) {
      copy_async(to, from, valid * 2);
    } else {
      Pair<T> pairs[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        pairs[e].set(2 * e < valid ? from[2 * e] : T(0.0f), 2 * e + 1 < valid ? from[2 * e + 1] : T(0.0f));
      *reinterpret_cast<uint4*>(to) = {pairs[0].bits, pairs[1].bits, pairs[2].bits, pairs[3].bits};
    }
  }
}

// Bytes below 128 as 16-bit numbers 2^7 or 2^10 + byte: the upper half of each is the same for all.
template <typename T>
constexpr uint32_t kUpper = 0x43434343;
template <>
constexpr uint32_t kUpper<half> = 0x64646464;

template <typename T>
__device__ inline void widen(uint32_t (&pairs)[2], uint32_t bytes) {
  pairs[0] = permute_bytes(bytes, kUpper<T>, 0x4140);
  pairs[1] = permute_bytes(bytes, kUpper<T>, 0x4342);
}

// high - low of four bytes each, exactly, as two pairs.
template <typename T>
__device__ inline void widen_difference(uint32_t* pairs, uint32_t high, uint32_t low) {
  uint32_t first[2], second[2];
  widen<T>(first, high);
  widen<T>(second, low);
  pairs[0] = subtract_pairs(first[0], second[0], T{});
  pairs[1] = subtract_pairs(first[1], second[1], T{});
}

// A lane's 8 columns of two units of a line, as values of T; `pair` counts units of a stage by two.
template <typename T, int Bits>
__device__ inline void load_units(uint32_t (&units)[2][4], const char* line, int row, int pair, int inside) {
  if constexpr (Bits == 16) {
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      const uint4 words = *reinterpret_cast<const uint4*>(line + swizzled(row, 4 * unit + inside) * 16);
      units[unit][0] = words.x, units[unit][1] = words.y, units[unit][2] = words.z, units[unit][3] = words.w;
    }
  } else if constexpr (Bits == 8) {
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      const int chunk = swizzled(row, 4 * pair + 2 * unit + inside / 2);
      const uint2 words = *reinterpret_cast<const uint2*>(line + chunk * 16 + inside % 2 * 8);
      // two's complement: the lower seven bits less the weight of the sign
      widen_difference<T>(units[unit], words.x & 0x7f7f7f7f, words.x & 0x80808080);
      widen_difference<T>(units[unit] + 2, words.y & 0x7f7f7f7f, words.y & 0x80808080);
    }
  } else {
    const int chunk = swizzled(row, 2 * pair + inside / 2);
    const uint2 words = *reinterpret_cast<const uint2*>(line + chunk * 16 + inside % 2 * 8);
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {  // low halves of 32 bytes, then high ones
      widen_difference<T>(units[unit], words.x >> 4 * unit & 0x0f0f0f0f, 0);
      widen_difference<T>(units[unit] + 2, words.y >> 4 * unit & 0x0f0f0f0f, 0);
    }
  }
}

}  // namespace saap
