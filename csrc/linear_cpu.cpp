// Products with packed weights for few tokens: bound by reading the weight, which happens once.
#include <algorithm>
#include <cmath>
#include <vector>

#include "packed_rows.h"

namespace saap {
namespace {

constexpr int64_t kStreams = 4;  // rows read side by side
constexpr int64_t kTileColumns = 1024;  // an unpacked tile stays in the first cache, and so does its part of x
constexpr int64_t kAhead = 2048;         // bytes of a row that are asked for before they are needed
constexpr float kLargest = 1e30f;       // of |x| for sums of Q * x, which could overflow where those of W * x do not

float activate(Activation activation, float v) {
  if (activation == Activation::silu) return v / (1.0f + std::exp(-v));
  const float inner = 0.7978845608028654f * (v + 0.044715f * v * v * v);  // the factor is sqrt(2 / pi)
  return 0.5f * v * (1.0f + std::tanh(inner));
}

// The rows of one task, kStreams of them: neighbours, or gates and after them as many up projections.
struct Rows {
  const PackedLinear& a;
  int64_t first;

  int64_t outputs() const { return a.activation == Activation::none ? kStreams : kStreams / 2; }
  int64_t at(int64_t i) const { return i < outputs() ? first + i : a.stride + first + i - outputs(); }

  // Writes the results of one token from the sums of its rows.
  void store(int64_t token, const float* sums) const {
    const int64_t stop = std::min(outputs(), a.rows - first);
    float* result = a.result + token * a.result_pitch + first;
    const float* bias = a.bias ? a.bias + first : nullptr;
    for (int64_t i = 0; i < stop; ++i) {
      result[i] = sums[i] + (bias ? bias[i] : 0.0f);
      if (a.activation == Activation::none) continue;
      const float up = sums[i + outputs()] + (bias ? bias[a.rows + i] : 0.0f);
      result[i] = activate(a.activation, result[i]) * up;
    }
  }
};

float sum_of_lanes(const float* v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// sums (kStreams, tokens, kLanes) += lanes of the products of kStreams rows of a tile with every token.
using Dot = void (*)(const float* tile, const float* x, int64_t x_pitch, int64_t tokens, int64_t columns, float* sums);
// sums (kStreams,) of one token with rows as they are stored.
using DotPacked = void (*)(const Rows& rows, const Scales& scales, const float* group_sums, float* sums);

void dot(const float* tile, const float* x, int64_t x_pitch, int64_t tokens, int64_t columns, float* sums) {
  for (int64_t r = 0; r < kStreams; ++r) {
    for (int64_t t = 0; t < tokens; ++t) {
      float lanes[kLanes] = {};
      for (int64_t c = 0; c < columns; c += kLanes)
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] += tile[r * kTileColumns + c + i] * x[t * x_pitch + c + i];
      for (int64_t i = 0; i < kLanes; ++i) sums[(r * tokens + t) * kLanes + i] += lanes[i];
    }
  }
}

#if defined(__x86_64__)
template <int kTokens>
SAAP_AVX2_F16C void dot_tokens(const float* tile, const float* x, int64_t x_pitch, int64_t columns, float* sums,
                                      int64_t row_pitch) {
  __m256 lanes[kStreams][kTokens] = {};
  for (int64_t c = 0; c < columns; c += kLanes) {
    __m256 values[kTokens];
    for (int t = 0; t < kTokens; ++t) values[t] = _mm256_loadu_ps(x + t * x_pitch + c);
    for (int r = 0; r < kStreams; ++r) {
      const __m256 weight = _mm256_loadu_ps(tile + r * kTileColumns + c);
      for (int t = 0; t < kTokens; ++t) lanes[r][t] = _mm256_fmadd_ps(weight, values[t], lanes[r][t]);
    }
  }
  for (int r = 0; r < kStreams; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      float* to = sums + r * row_pitch + t * kLanes;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), lanes[r][t]));
    }
  }
}

SAAP_AVX2_F16C void dot_wide(const float* tile, const float* x, int64_t x_pitch, int64_t tokens, int64_t columns,
                             float* sums) {
  const int64_t row_pitch = tokens * kLanes;
  for (int64_t t = 0, count; t < tokens; t += count) {
    count = std::min<int64_t>(3, tokens - t);  // twelve sums, the tokens' x and one weight fill the registers
    const auto kernel = count == 3 ? dot_tokens<3> : count == 2 ? dot_tokens<2> : dot_tokens<1>;
    kernel(tile, x + t * x_pitch, x_pitch, columns, sums + t * kLanes, row_pitch);
  }
}

// low and high (kStreams) += lanes of the products of one block's first and second half.
template <Storage kStorage>
SAAP_AVX2_F16C_INLINE void add_block(__m256* low, __m256* high, const uint8_t* const* rows, int64_t at,
                                     int64_t wanted, const float* x) {
  for (int r = 0; r < kStreams; ++r)
    for (int64_t line = 0; line < block_bytes(kStorage); line += 64) __builtin_prefetch(rows[r] + wanted + line);
  for (int part = 0; part < 4; ++part) {
    const __m256 first = _mm256_loadu_ps(x + kLanes * part), second = _mm256_loadu_ps(x + kHalf + kLanes * part);
    for (int r = 0; r < kStreams; ++r) {
      const Pair pair = block_pair<kStorage>(rows[r] + at, part);
      low[r] = _mm256_fmadd_ps(pair.low, first, low[r]);
      high[r] = _mm256_fmadd_ps(pair.high, second, high[r]);
    }
  }
}

// total + lanes of the zeros of one row times the sums of x; what was taken from Q is given back.
template <Storage kStorage>
SAAP_AVX2_F16C_INLINE __m256 add_zeros(__m256 total, const Scales& scales, int64_t slot, int64_t groups,
                                       const float* group_sums) {
  for (int64_t g = 0; g < groups; g += kLanes) {
    __m256 zero = _mm256_loadu_ps(scales.zeros(slot) + g);
    if (kStorage == Storage::int4)
      zero = _mm256_fmadd_ps(_mm256_set1_ps(kMiddle), _mm256_loadu_ps(scales.scales(slot) + g), zero);
    total = _mm256_fmadd_ps(zero, _mm256_loadu_ps(group_sums + g), total);
  }
  return total;
}

// Q * x is summed by group, then scaled; what the zeros add is their product with the groups' sums of x.
template <Storage kStorage>
SAAP_AVX2_F16C void dot_packed(const Rows& rows, const Scales& scales, const float* group_sums, float* sums) {
  const PackedRows& w = rows.a.weight;
  const int64_t blocks = (w.columns + kBlock - 1) / kBlock;
  const int64_t run = is_quantised(kStorage) ? w.group_size : kTileColumns;
  const int64_t step = run % kBlock ? 1 : run / kBlock;  // blocks whose halves each lie in one group
  // beyond its end a row is followed by that of the next task, not by its neighbour, which is being read
  const int64_t length = blocks * block_bytes(kStorage), next = rows.outputs() * w.pitch;
  const uint8_t* data[kStreams];
  __m256 total[kStreams];
  for (int r = 0; r < kStreams; ++r) {
    data[r] = w.data + rows.at(r) * w.pitch;
    total[r] = _mm256_setzero_ps();
  }
  for (int64_t b = 0, end; b < blocks; b = end) {
    end = std::min(blocks, b + step);
    __m256 low[kStreams] = {}, high[kStreams] = {};
    for (int64_t i = b; i < end; ++i) {
      const int64_t at = i * block_bytes(kStorage), ahead = at + kAhead;
      const int64_t wanted = ahead < length ? ahead : ahead - length + next;
      add_block<kStorage>(low, high, data, at, wanted, rows.a.x + i * kBlock);
    }
    for (int r = 0; r < kStreams; ++r) {
      float first = 1.0f, second = 1.0f;
      if (is_quantised(kStorage)) {
        first = scales.scales(r)[b * kBlock / w.group_size];
        second = scales.scales(r)[(b * kBlock + kHalf) / w.group_size];
      }
      if (kStorage == Storage::int4) second *= 1.0f / kHighFactor;
      total[r] = _mm256_fmadd_ps(_mm256_set1_ps(first), low[r], total[r]);
      total[r] = _mm256_fmadd_ps(_mm256_set1_ps(second), high[r], total[r]);
    }
  }
  for (int r = 0; r < kStreams; ++r) {
    if (is_quantised(kStorage)) total[r] = add_zeros<kStorage>(total[r], scales, r, w.groups, group_sums);
    float lanes[kLanes];
    _mm256_storeu_ps(lanes, total[r]);
    sums[r] = sum_of_lanes(lanes);
  }
}

DotPacked dot_packed_function(Storage storage) {
  switch (storage) {
    case Storage::f32: return dot_packed<Storage::f32>;
    case Storage::f16: return dot_packed<Storage::f16>;
    case Storage::bf16: return dot_packed<Storage::bf16>;
    case Storage::int8: return dot_packed<Storage::int8>;
    default: return dot_packed<Storage::int4>;
  }
}
#endif

// Sums of x by group; whether sums of Q * x are right with it: none overflows, and an infinity would meet Q = 0.
bool sum_groups(const PackedLinear& a, float* sums) {
  const int64_t columns = round_up(a.weight.columns, kBlock);
  float largest = 0.0f;
  for (int64_t c = 0; c < columns; c += kHalf) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < kHalf; ++i) lanes[i % kLanes] += a.x[c + i];
    for (int64_t i = 0; i < kHalf; ++i) largest = std::fabs(a.x[c + i]) <= largest ? largest : std::fabs(a.x[c + i]);
    sums[c / a.weight.group_size] += sum_of_lanes(lanes);
    if (!(largest <= kLargest)) return false;
  }
  return true;
}

// What a thread needs for its tasks.
struct Scratch {
  Scales scales;
  std::vector<float> tile, sums;

  explicit Scratch(const PackedLinear& a)
      : scales(a.weight, kStreams), tile(kStreams * kTileColumns), sums(kStreams * a.tokens * kLanes) {}
};

void multiply_unpacked(const Rows& rows, Scratch& scratch, Unpack unpack, Dot dot) {
  const PackedLinear& a = rows.a;
  const int64_t width = round_up(a.weight.columns, kBlock);
  // fp32 weights share the cache with their copy
  const int64_t step = a.weight.storage == Storage::f32 ? kTileColumns / 2 : kTileColumns;
  std::fill(scratch.sums.begin(), scratch.sums.end(), 0.0f);
  for (int64_t c = 0; c < width; c += step) {
    const int64_t columns = std::min(step, width - c);
    for (int64_t i = 0; i < kStreams; ++i) {
      const bool last = c + step >= width;  // then the next task's row follows
      const int64_t row = rows.at(i) + (last ? rows.outputs() : 0), block = last ? 0 : (c + step) / kBlock;
      const uint8_t* next = a.weight.data + row * a.weight.pitch + block * block_bytes(a.weight.storage);
      unpack(a.weight, rows.at(i), c / kBlock, columns / kBlock, scratch.scales.scales(i), scratch.scales.zeros(i),
             next, scratch.tile.data() + i * kTileColumns);
    }
    dot(scratch.tile.data(), a.x + c, a.x_pitch, a.tokens, columns, scratch.sums.data());
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    float sums[kStreams];
    for (int64_t i = 0; i < kStreams; ++i) sums[i] = sum_of_lanes(scratch.sums.data() + (i * a.tokens + t) * kLanes);
    rows.store(t, sums);
  }
}

}  // namespace

void packed_linear_f32(const PackedLinear& a) {
  const PackedRows& w = a.weight;
  const bool wide = has_avx2() && !a.portable;
  std::vector<float> group_sums(round_up(w.groups + 1, kLanes));
  const Unpack unpack = unpack_function(w.storage, wide);
  Dot dot_tile = dot;
  DotPacked dot_stored = nullptr;
#if defined(__x86_64__)
  if (wide) dot_tile = dot_wide;
  if (wide && a.tokens == 1 && (!is_quantised(w.storage) || sum_groups(a, group_sums.data())))
    dot_stored = dot_packed_function(w.storage);
#endif
  const int64_t outputs = Rows{a, 0}.outputs(), tasks = (a.rows + outputs - 1) / outputs;
  const int team = a.rows * w.columns < kSerialElements ? 1 : std::max(1, a.threads);
  (void)team;  // unused without OpenMP
#pragma omp parallel num_threads(team)
  {
    Scratch scratch(a);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const Rows rows{a, task * outputs};
      for (int64_t i = 0; i < kStreams; ++i) scratch.scales.read(w, rows.at(i), i, wide);
      if (dot_stored) {
        float sums[kStreams];
        dot_stored(rows, scratch.scales, group_sums.data(), sums);
        rows.store(0, sums);
      } else {
        multiply_unpacked(rows, scratch, unpack, dot_tile);
      }
    }
  }
  if (a.activation == Activation::none) return;
  for (int64_t t = 0; t < a.tokens; ++t)
    std::fill(a.result + t * a.result_pitch + a.rows, a.result + (t + 1) * a.result_pitch, 0.0f);
}

}  // namespace saap
