// x W' of 1 to 16 tokens in fp16 or bf16, bound by reading a weight of 16, 8 or 4 bits once.
//
// Weight rows are the 16 rows of mma's A, tokens the 8 columns of its B: tensor cores cost a fraction of what it takes
// to read the weight even for one token, and 4-bit weights would be bound by ordinary multiplications. A unit is 32
// columns, of which lane 4 g + i holds columns 8 i to 8 i + 7 of rows g and g + 8 and of token g: two mma. So fragments
// are contiguous bytes of shared memory on both sides, and no unit crosses a group of scales. Quantised weights are
// multiplied as the integers they are; scale and zero meet the sums of a group, zero those of x, which one more A of
// ones gives. Where x is not finite that form is undefined and the stage is multiplied again by scale * q + zero.
//
// A block owns 128 / slices rows. In each round its warps take `slices` neighbouring stages, 128 bytes of every row.
// Three of four stages of 16 KiB are in flight: 48 KiB of each block, two of which fit a Hopper multiprocessor, where
// 4.8 TB/s times 0.8 us over 132 multiprocessors want 29 KiB.
#include "linear_decode_multiply.cuh"

namespace saap {
namespace {

// The slices' sums in order, through shared memory, to the result or to this split's partial sums.
template <typename T, int Tiles>
__device__ inline void store_block(const LinearDecode& a, const Place& at, const Sums<Tiles>& total, int lines,
                                   int64_t split) {
  constexpr int tokens = 8 * Tiles;
  float* sums = reinterpret_cast<float*>(dynamic_shared());  // [slices][lines][tokens]
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
    for (int other = 0; other < Tiles; ++other)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int line = at.line + tile * kTileLines + e / 2 * 8 + at.group;
        sums[(at.slice * lines + line) * tokens + other * 8 + 2 * at.inside + e % 2] = total[tile][other][e];
      }
  synchronise();
  const auto sum_of = [&](int line, int64_t token) {
    float sum = 0.0f;
    for (int slice = 0; slice < a.slices; ++slice) sum += sums[(slice * lines + line) * tokens + token];
    return sum;
  };
  const bool gated = is_gated(a);
  const int rows = gated ? lines / 2 : lines;
  for (int index = threadIdx.x; index < rows * a.tokens; index += kThreads<Tiles>) {
    const int local = index % rows, line = gated ? local / 8 * kTileLines + local % 8 : local;
    const int64_t token = index / rows, row = at.row + local;
    if (row >= a.rows && !gated) continue;
    const float sum = sum_of(line, token), up = gated ? sum_of(line + 8, token) : 0.0f;
    if (a.splits == 1) {
      store_result<T>(a, token, row, sum, up);
    } else if (row < a.rows) {
      float* partial = a.partial + (split * (gated ? 2 : 1) * a.tokens + token) * a.rows + row;
      partial[0] = sum;
      if (gated) partial[a.tokens * a.rows] = up;
    }
  }
}

int64_t blocks_of(const LinearDecode& a) {
  const int64_t lines = kLines / a.slices, rows = a.activation == Activation::none ? lines : lines / 2;
  return ((a.activation == Activation::none ? a.rows : a.result_pitch) + rows - 1) / rows;
}

template <typename T, int Bits, int Tiles, bool Whole>
__global__ void __launch_bounds__(kThreads<Tiles>, 2) linear_decode_kernel(LinearDecode a) {
  const int lines = kLines / a.slices, columns = a.slices * kStageColumns<Bits>;
  const int64_t block = blockIdx.x / unsigned(a.splits);
  const int split = int(blockIdx.x % unsigned(a.splits)), rounds = (a.columns + columns - 1) / columns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Place at{lane, lane / 4, lane % 4, warp, warp % a.slices, warp / a.slices * kTileLines * Tiles,
                 block * (is_gated(a) ? lines / 2 : lines)};
  const int first = rounds * split / a.splits, last = rounds * (split + 1) / a.splits;
  const int stage_bytes = kWeightBytes + a.tokens * columns * 2, all_bytes = kStages * stage_bytes;
  char* shared = dynamic_shared();
  Copier<T, Bits, Tiles> copier(a, at, first);
  int filled = 0;  // offset of the stage that is filled next
  const auto copy_round = [&](int round) {
    if (round < last) copier.copy_round(a, shared + filled);
    commit_copies();
    filled = filled + stage_bytes == all_bytes ? 0 : filled + stage_bytes;
  };
#pragma unroll 1
  for (int round = first; round < first + kStages - 1; ++round) copy_round(round);

  const auto each_round = [&](const auto& multiply) {
    int stage = 0;
#pragma unroll 1
    for (int round = first; round < last; ++round) {
      wait_for_copies_but<kStages - 2>();
      synchronise();  // everybody's copies are here, and the stage that is filled next has been read
      copy_round(round + kStages - 1);
      multiply(stage);
      stage = stage + stage_bytes == all_bytes ? 0 : stage + stage_bytes;
    }
  };

  const Reader<T, Bits, Tiles> reader(a, at);
  Sums<Tiles> total = {};
  if constexpr (Bits == 16) {
    each_round([&](int stage) { multiply_stage<T, Tiles>(total, shared, stage, reader); });
  } else {
    ScaleReader<T, Bits, Tiles, Whole> scale_reader(a, at, first);
    Scales<T, Bits, Tiles, Whole> next;
    scale_reader.load_round(next, a);
    each_round([&](int stage) {
      Scales<T, Bits, Tiles, Whole> scales = next;
      scales.convert(a.scale_dtype == Dtype::f32);
      scale_reader.load_round(next, a);
      multiply_stage<T>(total, a, shared, stage, at, reader, scales);
    });
  }
  synchronise();  // the stages have been read; no copy is left
  store_block<T, Tiles>(a, at, total, lines, split);
}

template <typename T>
__global__ void __launch_bounds__(128) sum_splits(LinearDecode a) {
  const bool gated = is_gated(a);
  const int64_t extent = gated ? a.result_pitch : a.rows, plane = a.tokens * a.rows;
  const int64_t index = int64_t(blockIdx.x) * 128 + threadIdx.x, token = index / extent, row = index % extent;
  if (token >= a.tokens) return;
  float sum = 0.0f, up = 0.0f;
  if (row < a.rows)
    for (int64_t split = 0; split < a.splits; ++split) {
      const float* partial = a.partial + split * (gated ? 2 : 1) * plane + token * a.rows + row;
      sum += partial[0];
      if (gated) up += partial[plane];
    }
  store_result<T>(a, token, row, sum, up);
}

template <typename T, int Bits, int Tiles, bool Whole>
int run(const LinearDecode& a) {
  const int x_bytes = a.tokens * a.slices * kStageColumns<Bits> * 2;
  return launch(linear_decode_kernel<T, Bits, Tiles, Whole>, dim3(unsigned(blocks_of(a) * a.splits)), kThreads<Tiles>,
                kStages * (kWeightBytes + x_bytes), a.stream, a);
}

template <typename T, int Bits, bool Whole>
int run(const LinearDecode& a) {
  return a.tokens > 8 ? run<T, Bits, 2, Whole>(a) : run<T, Bits, 1, Whole>(a);
}

template <typename T>
int run(const LinearDecode& a) {
  const bool whole = a.bits == 16 || a.group % 128 == 0;
  const int error = a.bits == 16  ? run<T, 16, true>(a)
                    : a.bits == 8 ? (whole ? run<T, 8, true>(a) : run<T, 8, false>(a))
                                  : (whole ? run<T, 4, true>(a) : run<T, 4, false>(a));
  if (error != cudaSuccess || a.splits == 1) return error;
  const int64_t extent = a.activation == Activation::none ? a.rows : a.result_pitch;
  return launch(sum_splits<T>, dim3(unsigned((a.tokens * extent + 127) / 128)), 128, 0, a.stream, a);
}

}  // namespace

LinearDecodeTile linear_decode_tile() { return {kLines, kStageBytes, kElements}; }

int linear_decode(const LinearDecode& a) {
  switch (a.dtype) {
    case Dtype::f32: return linear_decode_f32(a);
    case Dtype::f16: return run<half>(a);
    case Dtype::bf16: return run<bfloat16>(a);
  }
  return cudaErrorInvalidValue;
}

}  // namespace saap
