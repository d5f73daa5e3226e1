// Fused multiply-reduce of one gradient tile against its weight tile; one read of each.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace saap {
namespace {

constexpr int64_t kBlock = 1024;            // columns summed in fp32 before the sum moves to fp64
constexpr int64_t kRowBlock = 64;          // likewise for sums over rows
constexpr int64_t kChunk = 512;             // columns whose sums over rows stay in the first cache
constexpr int64_t kSerialElements = 1 << 15;  // below this a thread team costs more than it saves

struct Sums {
  double abs = 0, square = 0, mixed = 0;
  void add(float s) {
    const double v = s;
    abs += std::fabs(v);
    square += v * v;
    mixed += std::fabs(v - 0.5 * v * v);
  }
};

#if defined(__x86_64__)
#define SAAP_AVX2 __attribute__((target("avx2,fma")))

SAAP_AVX2 inline double horizontal_sum(__m256 v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  const __m256d both = _mm256_add_pd(low, high);
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
  return _mm_cvtsd_f64(half) + _mm_cvtsd_f64(_mm_unpackhi_pd(half, half));
}

struct Lanes {
  __m256 abs, square, mixed;
};

SAAP_AVX2 inline void accumulate(Lanes& sums, const float* g, const float* w) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m256 s = _mm256_mul_ps(_mm256_loadu_ps(g), _mm256_loadu_ps(w));
  const __m256 rest = _mm256_fnmadd_ps(_mm256_mul_ps(s, _mm256_set1_ps(0.5f)), s, s);
  sums.abs = _mm256_add_ps(sums.abs, _mm256_andnot_ps(sign, s));
  sums.square = _mm256_fmadd_ps(s, s, sums.square);
  sums.mixed = _mm256_add_ps(sums.mixed, _mm256_andnot_ps(sign, rest));
}

SAAP_AVX2 Sums row_sums_avx2(const float* g, const float* w, int64_t columns) {
  Sums total;
  int64_t c = 0;
  while (c + 16 <= columns) {
    const int64_t stop = std::min(columns - columns % 16, c + kBlock);
    Lanes a{}, b{};  // two chains hide the latency of the additions
    for (; c < stop; c += 16) {
      accumulate(a, g + c, w + c);
      accumulate(b, g + c + 8, w + c + 8);
    }
    total.abs += horizontal_sum(_mm256_add_ps(a.abs, b.abs));
    total.square += horizontal_sum(_mm256_add_ps(a.square, b.square));
    total.mixed += horizontal_sum(_mm256_add_ps(a.mixed, b.mixed));
  }
  for (; c < columns; ++c) total.add(g[c] * w[c]);
  return total;
}

// sums (3, kChunk) += sums over Rows rows of `columns` (a multiple of 8) columns. Rows are read as streams: strips of
// columns over all rows, or more rows at once, collide in the cache when the pitch is a power of two.
template <int Rows>
SAAP_AVX2 void add_rows_avx2(const float* g, int64_t g_pitch, const float* w, int64_t w_pitch, int64_t columns,
                             float* sums) {
  for (int64_t c = 0; c < columns; c += 8) {
    float* out = sums + c;
    Lanes lanes{_mm256_loadu_ps(out), _mm256_loadu_ps(out + kChunk), _mm256_loadu_ps(out + 2 * kChunk)};
    for (int r = 0; r < Rows; ++r) accumulate(lanes, g + r * g_pitch + c, w + r * w_pitch + c);
    _mm256_storeu_ps(out, lanes.abs);
    _mm256_storeu_ps(out + kChunk, lanes.square);
    _mm256_storeu_ps(out + 2 * kChunk, lanes.mixed);
  }
}

// Sums over rows of `columns` (a multiple of 8, at most kChunk) columns, added to lines.
SAAP_AVX2 void column_sums_avx2(const float* g, int64_t g_pitch, const float* w, int64_t w_pitch, int64_t rows,
                                int64_t columns, Sums* lines) {
  for (int64_t start = 0; start < rows; start += kRowBlock) {
    const int64_t stop = std::min(rows, start + kRowBlock);
    float sums[3 * kChunk] = {};
    int64_t r = start;
    for (; r + 4 <= stop; r += 4) add_rows_avx2<4>(g + r * g_pitch, g_pitch, w + r * w_pitch, w_pitch, columns, sums);
    for (; r < stop; ++r) add_rows_avx2<1>(g + r * g_pitch, g_pitch, w + r * w_pitch, w_pitch, columns, sums);
    for (int64_t c = 0; c < columns; ++c) {
      lines[c].abs += sums[c];
      lines[c].square += sums[kChunk + c];
      lines[c].mixed += sums[2 * kChunk + c];
    }
  }
}
#endif

Sums row_sums(const float* g, const float* w, int64_t columns) {
  Sums total;
  for (int64_t c = 0; c < columns; ++c) total.add(g[c] * w[c]);
  return total;
}

Sums column_sum(const float* g, int64_t g_pitch, const float* w, int64_t w_pitch, int64_t rows) {
  Sums total;
  for (int64_t r = 0; r < rows; ++r) total.add(g[r * g_pitch] * w[r * w_pitch]);
  return total;
}

void reduce_units(const std::vector<Sums>& lines, int64_t unit_size, float* sums) {
  const int64_t units = static_cast<int64_t>(lines.size()) / unit_size;
  for (int64_t u = 0; u < units; ++u) {
    Sums total;
    for (int64_t i = u * unit_size; i < (u + 1) * unit_size; ++i) {
      total.abs += lines[i].abs;
      total.square += lines[i].square;
      total.mixed += lines[i].mixed;
    }
    sums[u] += static_cast<float>(total.abs);
    sums[units + u] += static_cast<float>(total.square);
    sums[2 * units + u] += static_cast<float>(total.mixed);
  }
}

#if defined(__x86_64__)
// Compilers before GCC 11 cannot be asked for it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

}  // namespace

bool has_avx2() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  return supported;
#else
  return false;
#endif
}

void salience_reduce_f32(const float* gradient, int64_t gradient_pitch, const float* weight, int64_t weight_pitch,
                         int64_t rows, int64_t columns, int64_t unit_size, int axis, float* sums, int threads) {
  std::vector<Sums> lines(axis == 0 ? rows : columns);
  const bool wide = has_avx2();
  const int team = rows * columns < kSerialElements ? 1 : std::max(1, threads);
  (void)team;  // unused without OpenMP
  if (axis == 0) {
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const float* g = gradient + r * gradient_pitch;
      const float* w = weight + r * weight_pitch;
#if defined(__x86_64__)
      lines[r] = wide ? row_sums_avx2(g, w, columns) : row_sums(g, w, columns);
#else
      lines[r] = row_sums(g, w, columns);
#endif
    }
  } else {
    const int64_t blocks = (columns + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t first = block * kChunk;
      const int64_t stop = std::min(columns, first + kChunk);
#if defined(__x86_64__)
      if (wide) {
        const int64_t count = (stop - first) / 8 * 8;
        column_sums_avx2(gradient + first, gradient_pitch, weight + first, weight_pitch, rows, count, &lines[first]);
        first += count;
      }
#endif
      for (; first < stop; ++first)
        lines[first] = column_sum(gradient + first, gradient_pitch, weight + first, weight_pitch, rows);
    }
  }
  (void)wide;
  reduce_units(lines, unit_size, sums);
}

void coupled_accumulate_f32(const float* gradient, int64_t gradient_pitch, const float* weight, int64_t weight_pitch,
                            int64_t rows, int64_t columns, float* mean, float* square, int threads) {
  const int team = rows * columns < kSerialElements ? 1 : std::max(1, threads);
  (void)team;
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const float* g = gradient + r * gradient_pitch;
    const float* w = weight + r * weight_pitch;
    float* m = mean + r * columns;
    float* q = square + r * columns;
    for (int64_t c = 0; c < columns; ++c) {
      const float s = g[c] * w[c];
      m[c] += s;
      q[c] += s * s;
    }
  }
}

}  // namespace saap
