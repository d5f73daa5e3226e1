// Sums over tokens of x * dx, x - shift, (x - shift)^2, |x|, and max |x|; one read of each operand.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace saap {
namespace {

constexpr int64_t kColumns = 512;  // of one task: its fp32 accumulators stay in L1, its rows are 2 KiB runs
constexpr int64_t kRows = 64;      // summed in fp32 before the sums move to fp64

struct Block {
  float salience[kColumns], sum[kColumns], square[kColumns], absmax[kColumns], absolute[kColumns];
};

// One row into the accumulators: element-wise, so that the compiler vectorises it without reordering sums.
template <bool kSalience, bool kStatistics>
__attribute__((always_inline)) inline void add_row(Block& block, const float* x, const float* dx, const float* shift,
                                                   int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    if (kSalience) block.salience[c] += x[c] * dx[c];
    if (kStatistics) {
      const float moved = x[c] - shift[c], size = std::fabs(x[c]);
      block.sum[c] += moved;
      block.square[c] += moved * moved;
      block.absmax[c] = size > block.absmax[c] ? size : block.absmax[c];
      block.absolute[c] += size;
    }
  }
}

template <bool kSalience, bool kStatistics>
__attribute__((always_inline)) inline void add_rows(Block& block, const ActivationSums& a, const float* shift,
                                                    int64_t first, int64_t last, int64_t column, int64_t columns) {
  for (int64_t row = first; row < last; ++row)
    add_row<kSalience, kStatistics>(block, a.x + row * a.x_pitch + column,
                                    kSalience ? a.dx + row * a.dx_pitch + column : nullptr, shift, columns);
}

#if defined(__x86_64__)
#define SAAP_AVX2 __attribute__((target("avx2,fma")))
#else
#define SAAP_AVX2
#endif

template <bool kSalience, bool kStatistics>
SAAP_AVX2 void add_rows_wide(Block& block, const ActivationSums& a, const float* shift, int64_t first, int64_t last,
                             int64_t column, int64_t columns) {
  add_rows<kSalience, kStatistics>(block, a, shift, first, last, column, columns);
}

template <bool kSalience, bool kStatistics>
void add_rows_plain(Block& block, const ActivationSums& a, const float* shift, int64_t first, int64_t last,
                    int64_t column, int64_t columns) {
  add_rows<kSalience, kStatistics>(block, a, shift, first, last, column, columns);
}

template <bool kSalience, bool kStatistics>
void run_task(const ActivationSums& a, int64_t sequence, int64_t column, bool wide) {
  const int64_t columns = std::min(kColumns, a.features - column);
  const int64_t start = a.spans[2 * sequence], stop = a.spans[2 * sequence + 1];
  std::vector<double> salience(columns), sum(columns), square(columns), absolute(columns);
  std::vector<float> shift(columns, 0.0f);
  if (a.shift) std::copy(a.shift + column, a.shift + column + columns, shift.begin());
  Block block;
  std::fill(block.absmax, block.absmax + columns, 0.0f);
  for (int64_t row = start; row < stop; row += kRows) {
    std::fill(block.salience, block.salience + columns, 0.0f);
    std::fill(block.sum, block.sum + columns, 0.0f);
    std::fill(block.square, block.square + columns, 0.0f);
    std::fill(block.absolute, block.absolute + columns, 0.0f);
    const int64_t last = std::min(stop, row + kRows);
    (wide ? add_rows_wide<kSalience, kStatistics> : add_rows_plain<kSalience, kStatistics>)(
        block, a, shift.data(), row, last, column, columns);
    for (int64_t c = 0; c < columns; ++c) {
      salience[c] += block.salience[c];
      sum[c] += block.sum[c];
      square[c] += block.square[c];
      absolute[c] += block.absolute[c];
    }
  }
  const int64_t at = sequence * a.features + column;
  if (kSalience)
    for (int64_t c = 0; c < columns; ++c) a.salience[at + c] = static_cast<float>(salience[c]);
  if (!kStatistics) return;
  const int64_t plane = a.sequences * a.features;
  for (int64_t c = 0; c < columns; ++c) {
    a.statistics[at + c] = static_cast<float>(sum[c]);
    a.statistics[plane + at + c] = static_cast<float>(square[c]);
    a.statistics[2 * plane + at + c] = block.absmax[c];
    a.statistics[3 * plane + at + c] = static_cast<float>(absolute[c]);
  }
}

}  // namespace

void activation_sums_f32(const ActivationSums& a) {
  const int64_t blocks = (a.features + kColumns - 1) / kColumns;
  const bool wide = has_avx2();
  const auto task = a.salience ? (a.statistics ? run_task<true, true> : run_task<true, false>) : run_task<false, true>;
#pragma omp parallel for num_threads(std::max(1, a.threads)) schedule(static)
  for (int64_t index = 0; index < blocks * a.sequences; ++index)
    task(a, index / blocks, index % blocks * kColumns, wide);
}

}  // namespace saap
