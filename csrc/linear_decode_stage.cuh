// A stage of linear_decode.cu in shared memory: how weight and tokens get there, and how lanes read their fragments.
#pragma once

#include <type_traits>

#include "linear_decode.cuh"

namespace saap {
namespace {

constexpr int kLines = 128, kStageBytes = 128, kStages = 4;
constexpr int kWeightBytes = kLines * kStageBytes, kElements = 4096;  // of a stage: the weight's bytes, x at most
constexpr int kTileLines = 16, kTileBytes = kTileLines * kStageBytes, kUnit = 32;

template <int Bits>
constexpr int kStageColumns = kStageBytes * 8 / Bits;

// Tiles: of rows that a warp owns, and of tokens.
template <int Tiles>
constexpr int kThreads = kLines / (kTileLines * Tiles) * 32;

// A row's 16-byte chunks are permuted by an exclusive or with this, so that reads of 64 bytes of two neighbouring rows,
// or of 32 bytes of four, meet different banks. Offsets into rows of whole 128 bytes may be combined the same way.
__device__ inline int swizzle(int row) { return (row & 1) << 2 | (row & 2); }

// Where a warp and a lane stand.
struct Place {
  int lane, group, inside;  // rows group and group + 8 of a tile, token group; columns 8 inside to 8 inside + 7
  int warp, slice;
  int line;     // of the block, the warp's first
  int64_t row;  // of the weight, the block's first
};

// A tile's 16 lines are neighbouring rows, or 8 of the gate and the same 8 of the up projection. Lines without a row
// repeat the last one.
__device__ inline int64_t row_of(const LinearDecode& a, const Place& at, int line) {
  const int of_block = at.line + line;
  const int64_t row = at.row + (is_gated(a) ? of_block / kTileLines * 8 + of_block % 8 : of_block);
  return row < a.rows ? row : a.rows - 1;
}
__device__ inline bool is_up(const LinearDecode& a, int line) { return is_gated(a) && line / 8 % 2; }

// What a lane copies, round after round: 16 bytes of every fourth of its warp's lines, and chunks of tokens.
template <typename T, int Bits, int Tiles>
struct Copier {
  const char* weight[4 * Tiles];
  const T* x;
  int byte, column;           // of the row, next
  int weight_to, chunk, token;  // in the stage
  int chunks, tokens_apart;     // of a token's row in the stage; from one token of this lane to the next
  int64_t x_apart;
  bool aligned;

  __device__ Copier(const LinearDecode& a, const Place& at, int round)
      : byte((round * a.slices + at.slice) * kStageBytes + at.lane % 8 * 16),
        chunks(a.slices * kStageColumns<Bits> / 8),
        aligned(reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && (a.tokens == 1 || a.x_pitch % 8 == 0)) {
    const int line = at.lane / 8;
#pragma unroll
    for (int i = 0; i < 4 * Tiles; ++i) {
      const int64_t offset = row_of(a, at, line + 4 * i) * a.weight_pitch + byte;
      weight[i] = static_cast<const char*>(a.weight) + (is_up(a, line + 4 * i) ? a.weight_half : 0) + offset;
    }
    weight_to = at.warp * Tiles * kTileBytes + line * kStageBytes + ((at.lane % 8) ^ swizzle(line)) * 16;
    chunk = int(threadIdx.x) % chunks, token = int(threadIdx.x) / chunks, tokens_apart = kThreads<Tiles> / chunks;
    column = (round * chunks + chunk) * 8;
    x = static_cast<const T*>(a.x) + token * a.x_pitch + column, x_apart = tokens_apart * a.x_pitch;
    keep(weight_to);
  }

  __device__ void copy_round(const LinearDecode& a, char* stage) {
    const int bytes = byte < a.weight_pitch ? 16 : 0, step = a.slices * kStageBytes;
#pragma unroll
    for (int i = 0; i < 4 * Tiles; ++i) {
      copy_async_once(stage + weight_to + i * 4 * kStageBytes, weight[i], bytes);
      weight[i] += step;
    }
    byte += step;
    const int left = a.columns - column, valid = left < 0 ? 0 : left < 8 ? left : 8;  // beyond is not x
    const T* from = x;
    for (int t = token; t < a.tokens; t += tokens_apart, from += x_apart) {
      char* to = stage + kWeightBytes + (t * chunks + (chunk ^ swizzle(t))) * 16;
      aligned ? copy_async(to, from, valid * 2) : copy_values(to, from, valid);
    }
    x += chunks * 8, column += chunks * 8;
  }

  __device__ static void copy_values(char* to, const T* from, int valid) {
    Pair<T> pairs[4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      pairs[e].set(2 * e < valid ? from[2 * e] : T(0.0f), 2 * e + 1 < valid ? from[2 * e + 1] : T(0.0f));
    *reinterpret_cast<uint4*>(to) = {pairs[0].bits, pairs[1].bits, pairs[2].bits, pairs[3].bits};
  }
};

// Bytes into the lower halves of 16-bit numbers whose upper halves are all the same.
__device__ inline void spread(uint32_t* pairs, uint32_t bytes, uint32_t upper) {
  pairs[0] = permute_bytes(bytes, upper, 0x4140);
  pairs[1] = permute_bytes(bytes, upper, 0x4342);
}

// What is added to a quantised weight in its fragment: numbers that cost no subtraction, small enough that the sums
// of products by it, taken away again in fp32, cost no digit that T could show.
template <typename T, int Bits>
constexpr float kOffset = Bits == 4 ? (std::is_same<T, half>::value ? 64.0f : 128.0f)
                                    : (Bits == 8 && std::is_same<T, half>::value ? 1152.0f : 0.0f);

// Four weights of 8 bits.
__device__ inline void widen_bytes(uint32_t* pairs, uint32_t word, half) {
  spread(pairs, word ^ 0x80808080, 0x64646464);  // 1024 + 128 + q
}
__device__ inline void widen_bytes(uint32_t* pairs, uint32_t word, bfloat16) {
  uint32_t sign[2];
  spread(pairs, word & 0x7f7f7f7f, 0x43434343);  // 128 + the lower seven bits
  spread(sign, word & 0x80808080, 0x43434343);   // 128 + the weight of the sign
  pairs[0] = subtract_pairs(pairs[0], sign[0], bfloat16{});
  pairs[1] = subtract_pairs(pairs[1], sign[1], bfloat16{});
}

// The low or high halves of four bytes.
__device__ inline void widen_halves(uint32_t* pairs, uint32_t word, int high, half) {
  spread(pairs, (high ? word : word << 4) & 0xf0f0f0f0, 0x54545454);  // 64 + q
}
__device__ inline void widen_halves(uint32_t* pairs, uint32_t word, int high, bfloat16) {
  spread(pairs, (high ? word >> 4 : word) & 0x0f0f0f0f, 0x43434343);  // 128 + q
}

// A lane's 8 columns of two units of a line, as values of T plus kOffset. `at` is the offset of the first of a stage.
template <typename T, int Bits>
__device__ inline void load_units(uint32_t (&units)[2][4], const char* shared, int at, int pair) {
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    if constexpr (Bits == 16) {
      const uint4 words = *reinterpret_cast<const uint4*>(shared + (at ^ 64 * unit));
      units[unit][0] = words.x, units[unit][1] = words.y, units[unit][2] = words.z, units[unit][3] = words.w;
    } else if constexpr (Bits == 8) {
      const uint2 words = *reinterpret_cast<const uint2*>(shared + (at ^ (64 * pair + 32 * unit)));
      widen_bytes(units[unit], words.x, T{});
      widen_bytes(units[unit] + 2, words.y, T{});
    } else {  // low halves of 32 bytes, then high ones
      const uint2 words = *reinterpret_cast<const uint2*>(shared + (at ^ 32 * pair));
      widen_halves(units[unit], words.x, unit, T{});
      widen_halves(units[unit] + 2, words.y, unit, T{});
    }
  }
}

// What a lane reads of a stage.
template <typename T, int Bits, int Tiles>
struct Reader {
  int weight, x[Tiles];  // offsets into the stage

  __device__ Reader(const LinearDecode& a, const Place& at) {
    const int chunk = (Bits == 16 ? at.inside : at.inside / 2) ^ swizzle(at.group);
    weight = at.warp * Tiles * kTileBytes + at.group * kStageBytes + chunk * 16 + (Bits == 16 ? 0 : at.inside % 2 * 8);
    keep(weight);
    constexpr int chunks = kStageColumns<Bits> / 8;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const int wanted = tile * 8 + at.group, token = wanted < a.tokens ? wanted : a.tokens - 1;  // columns not stored
      x[tile] = kWeightBytes + ((token * a.slices + at.slice) * chunks + (at.inside ^ swizzle(token))) * 16;
      keep(x[tile]);
    }
  }

  __device__ void load_rows(uint32_t (&units)[2][2][4], const char* shared, int stage, int tile, int pair) const {
    const int first = stage + weight + tile * kTileBytes;
    load_units<T, Bits>(units[0], shared, first, pair);
    load_units<T, Bits>(units[1], shared, first + 8 * kStageBytes, pair);
  }

  __device__ void load_tokens(uint32_t (&words)[Tiles][4], const char* shared, int stage, int unit) const {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const int offset = ((stage + x[tile]) ^ unit % 2 * 64) + unit / 2 * 128;
      const uint4 loaded = *reinterpret_cast<const uint4*>(shared + offset);
      words[tile][0] = loaded.x, words[tile][1] = loaded.y, words[tile][2] = loaded.z, words[tile][3] = loaded.w;
    }
  }
};

}  // namespace
}  // namespace saap
