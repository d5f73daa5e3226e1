// dW of a tile on tensor cores, one sequence at a time, multiplied by w and reduced in registers.
//
// P (T, U) is the operand on the units' side, Q (T, R) the other. A block of threads owns a tile of P'Q and
// runs over all sequences' token blocks in one pipelined loop; at the last block of a sequence the tile is
// multiplied by w and summed over R into partial[want, sequence, tile of R, U]. Ordered, no atomics. fp32
// operands, the correctness path, run on the ordinary units with the same layout of accumulators.
#include "device.cuh"
#include "kernels.h"

namespace saap {
namespace {

constexpr int kThreads = 256, kStages = 4, kWarpsU = 2, kWarpsR = 4;
constexpr int kColumns = 4;                        // 8-wide column blocks of a warp's tile
constexpr int kBlockR = kWarpsR * kColumns * 8;
constexpr int kGroupU = 8;                         // rows of tiles that run together, so that both operands stay in L2
constexpr int kSums = 3;                           // |s|, s^2 and |s - s^2 / 2|

// Rows: 16-high row blocks of a warp's tile. The coupled form keeps three accumulators, so its tile is half as high.
template <typename T, int Rows>
struct Tile {
  static constexpr int block_u = kWarpsU * Rows * 16;
  static constexpr int tokens = 64 / int(sizeof(T));
  static constexpr int stage = tokens * (block_u + kBlockR);  // elements of P and Q
  static constexpr int shared_bytes = kStages * stage * int(sizeof(T)) + kSums * kWarpsR * block_u * int(sizeof(float));
};

// Where (row, column) of a tile lies: 16-byte chunks are permuted within a row, so that eight rows' chunks of one
// column lie in different banks.
template <int Columns, int Vector>
__device__ inline int at(int row, int column) {
  return row * Columns + ((column / Vector) ^ (row & 7)) * Vector + column % Vector;
}

template <typename T, int Columns, int Tokens>
__device__ inline void copy_rows(T* tile, const T* source, int64_t pitch, int64_t extent, int64_t first_column,
                                 int64_t first_row, int rows) {
  constexpr int vector = 16 / int(sizeof(T)), chunks = Columns / vector;
#pragma unroll
  for (int start = 0; start < Tokens * chunks; start += kThreads) {
    const int index = start + int(threadIdx.x), row = index / chunks, column = index % chunks * vector;
    const bool inside = row < rows && first_column + column < extent;
    const T* from = inside ? source + (first_row + row) * pitch + first_column + column : source;
    copy_async(tile + at<Columns, vector>(row, column), from, inside ? 16 : 0);
  }
}

struct Lane {
  int warp_u, warp_r, group, inside;  // C fragments: rows group and group + 8, columns 2 inside and 2 inside + 1
};

// acc (Rows x kColumns fragments of 16 x 8) += P'Q of one token block.
template <int Rows, typename T>
__device__ inline void multiply(float (&acc)[Rows][kColumns][4], const T* p, const T* q, const Lane& lane) {
  using Shape = Tile<T, Rows>;
  const int l = threadIdx.x % 32, u = lane.warp_u * Rows * 16, r = lane.warp_r * kColumns * 8;
#pragma unroll
  for (int k = 0; k < Shape::tokens; k += 16) {
    uint32_t a[Rows][4], b[kColumns][2];
#pragma unroll
    for (int i = 0; i < Rows; ++i)
      load_matrices_transposed(a[i], p + at<Shape::block_u, 8>(k + l / 16 * 8 + l % 8, u + i * 16 + l / 8 % 2 * 8));
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t two[4];
      load_matrices_transposed(two, q + at<kBlockR, 8>(k + l / 8 % 2 * 8 + l % 8, r + j * 8 + l / 16 * 8));
      b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
    }
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) multiply_add(acc[i][j], a[i], b[j], T{});
  }
}

template <int Rows>
__device__ inline void multiply(float (&acc)[Rows][kColumns][4], const float* p, const float* q, const Lane& lane) {
  using Shape = Tile<float, Rows>;
  const int u = lane.warp_u * Rows * 16 + lane.group, r = lane.warp_r * kColumns * 8 + 2 * lane.inside;
#pragma unroll 4
  for (int k = 0; k < Shape::tokens; ++k) {
    float left[Rows][2], right[kColumns][2];
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) left[i][h] = p[at<Shape::block_u, 4>(k, u + i * 16 + h * 8)];
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) right[j][c] = q[at<kBlockR, 4>(k, r + j * 8 + c)];
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = fmaf(left[i][e / 2], right[j][e % 2], acc[i][j][e]);
  }
}

// Each line's sums over a warp's columns to shared memory, [kSums][kWarpsR][block_u]; add(i, j, e, values) adds what
// element e of fragment (i, j) contributes.
template <int Rows, typename Add>
__device__ inline void keep_lines(float* sums, const Lane& lane, const Add& add) {
  constexpr int block_u = kWarpsU * Rows * 16;
#pragma unroll
  for (int i = 0; i < Rows; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float values[kSums] = {};
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) add(i, j, e, values);
      const int line = (lane.warp_u * Rows + i) * 16 + h * 8 + lane.group;
#pragma unroll
      for (int which = 0; which < kSums; ++which) {
        values[which] += shuffle_xor(values[which], 1);
        values[which] += shuffle_xor(values[which], 2);
        if (lane.inside == 0) sums[(which * kWarpsR + lane.warp_r) * block_u + line] = values[which];
      }
    }
}

template <int BlockU>
__device__ inline void store_lines(const WeightSalience& a, const float* sums, int64_t u, int64_t slot) {
  synchronise();
  for (int index = threadIdx.x; index < kSums * BlockU; index += kThreads) {
    const int which = index / BlockU, line = index % BlockU;
    if (a.slots[which] < 0 || u + line >= a.lines) continue;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarpsR; ++warp) sum += sums[(which * kWarpsR + warp) * BlockU + line];
    a.partial[a.slots[which] * a.plane + slot * a.lines + u + line] = sum;
  }
}

template <typename T, int Rows, bool Coupled>
__global__ void __launch_bounds__(kThreads, 1) weight_salience_kernel(WeightSalience a) {
  using Shape = Tile<T, Rows>;
  T* stages = reinterpret_cast<T*>(dynamic_shared());
  float* sums = reinterpret_cast<float*>(stages + kStages * Shape::stage);
  const int warp = threadIdx.x / 32, l = threadIdx.x % 32;
  const Lane lane{warp / kWarpsR, warp % kWarpsR, l / 4, l % 4};

  const int64_t tiles_u = (a.lines + Shape::block_u - 1) / Shape::block_u;
  const int64_t tiles_r = (a.entries + kBlockR - 1) / kBlockR;
  const int64_t first = blockIdx.x / (kGroupU * tiles_r) * kGroupU, within = blockIdx.x % (kGroupU * tiles_r);
  const int64_t height = tiles_u - first < kGroupU ? tiles_u - first : kGroupU;
  const int64_t tile_r = within / height, u = (first + within % height) * Shape::block_u, r = tile_r * kBlockR;

  const auto copy_block = [&](int64_t block) {
    if (block < a.block_count) {
      const int32_t* entry = a.blocks + 5 * block;  // first row, rows, sequence at its last block
      T* p = stages + block % kStages * Shape::stage;
      copy_rows<T, Shape::block_u, Shape::tokens>(p, static_cast<const T*>(a.p), a.p_pitch, a.p_columns, u, entry[0],
                                                  entry[1]);
      copy_rows<T, kBlockR, Shape::tokens>(p + Shape::tokens * Shape::block_u, static_cast<const T*>(a.q), a.q_pitch,
                                           a.q_columns, r, entry[0], entry[1]);
    }
    commit_copies();
  };
  for (int64_t block = 0; block < kStages - 1; ++block) copy_block(block);

  Pair<T> weight[Rows][kColumns][2];  // zero outside w: padding adds nothing
  const auto load_weight = [&](int64_t line, int64_t entry) {
    const bool inside = line < a.lines && entry < a.entries;
    return inside ? static_cast<const T*>(a.w)[line * a.w_stride_u + entry * a.w_stride_r] : T(0.0f);
  };
#pragma unroll
  for (int i = 0; i < Rows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t line = u + (lane.warp_u * Rows + i) * 16 + h * 8 + lane.group;
        const int64_t entry = r + (lane.warp_r * kColumns + j) * 8 + 2 * lane.inside;
        weight[i][j][h].set(load_weight(line, entry), load_weight(line, entry + 1));
      }

  float acc[Rows][kColumns][4] = {}, mean[Rows][kColumns][4] = {}, square[Rows][kColumns][4] = {};
  for (int64_t block = 0; block < a.block_count; ++block) {
    wait_for_copies_but<kStages - 2>();
    synchronise();  // everybody's copies are here, and the stage that is filled next has been read
    copy_block(block + kStages - 1);
    const T* p = stages + block % kStages * Shape::stage;
    multiply<Rows>(acc, p, p + Shape::tokens * Shape::block_u, lane);
    const int32_t sequence = a.blocks[5 * block + 2];
    if (sequence < 0) continue;
    if constexpr (Coupled) {
#pragma unroll
      for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float t = acc[i][j][e] * weight[i][j][e / 2].get(e % 2);  // salience / scale
            acc[i][j][e] = 0.0f;
            mean[i][j][e] += t;
            square[i][j][e] = fmaf(t, t, square[i][j][e]);
          }
    } else {
      keep_lines<Rows>(sums, lane, [&](int i, int j, int e, float(&values)[kSums]) {
        const float t = acc[i][j][e] * weight[i][j][e / 2].get(e % 2);
        acc[i][j][e] = 0.0f;
        values[0] += fabsf(t);
        values[1] = fmaf(t, t, values[1]);
        values[2] += fabsf(t - 0.5f * a.scale * t * t);
      });
      store_lines<Shape::block_u>(a, sums, u, sequence * tiles_r + tile_r);
    }
  }
  if constexpr (Coupled) {
    keep_lines<Rows>(sums, lane, [&](int i, int j, int e, float(&values)[kSums]) {
      values[0] += fabsf(mean[i][j][e]);
      values[1] += square[i][j][e];
      values[2] += fabsf(mean[i][j][e] - 0.5f * a.scale * square[i][j][e]);
    });
    store_lines<Shape::block_u>(a, sums, u, tile_r);
  }
}

template <typename T, bool Coupled>
int run(const WeightSalience& a) {
  constexpr int rows = Coupled ? 2 : 4;
  using Shape = Tile<T, rows>;
  const int64_t tiles = (a.lines + Shape::block_u - 1) / Shape::block_u * ((a.entries + kBlockR - 1) / kBlockR);
  return launch(weight_salience_kernel<T, rows, Coupled>, dim3(unsigned(tiles)), kThreads, Shape::shared_bytes,
                a.stream, a);
}

template <typename T>
int run(const WeightSalience& a) {
  return a.coupled ? run<T, true>(a) : run<T, false>(a);
}

}  // namespace

WeightSalienceTile weight_salience_tile(Dtype dtype) {
  return {kBlockR, dtype == Dtype::f32 ? Tile<float, 4>::tokens : Tile<half, 4>::tokens};
}

int weight_salience(const WeightSalience& a) {
  switch (a.dtype) {
    case Dtype::f32: return run<float>(a);
    case Dtype::f16: return run<half>(a);
    case Dtype::bf16: return run<bfloat16>(a);
  }
  return cudaErrorInvalidValue;
}

}  // namespace saap
