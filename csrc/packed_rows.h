// Rows of a packed weight: their scales, and blocks of them as fp32.
#pragma once

#include <vector>

#include "packed_blocks.h"

namespace saap {

constexpr int64_t kLanes = 8;                 // of sums, whichever code path forms them
constexpr int64_t kSerialElements = 1 << 15;  // below this a thread team costs more than it saves

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Scale and zero of a few rows as fp32. A row's pitch has room for whole vectors and for the group after the last,
// which the second half of the last block may belong to; all of that is zero.
struct Scales {
  int64_t pitch;
  std::vector<float> scale, zero;

  Scales(const PackedRows& w, int64_t rows)
      : pitch(round_up(w.groups + 1, kLanes)), scale(rows * pitch), zero(rows * pitch) {}

  // Those of one row into a slot; nothing for weights that are not quantised.
  void read(const PackedRows& w, int64_t row, int64_t slot, bool wide);
  const float* scales(int64_t slot) const { return scale.data() + slot * pitch; }
  const float* zeros(int64_t slot) const { return zero.data() + slot * pitch; }
};

// Blocks of one row as fp32, given its scales; as many bytes from ``next`` on are asked for, to be read afterwards.
using Unpack = void (*)(const PackedRows& w, int64_t row, int64_t block, int64_t blocks, const float* scale,
                        const float* zero, const uint8_t* next, float* result);

Unpack unpack_function(Storage storage, bool wide);

}  // namespace saap
