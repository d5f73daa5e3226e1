// Runs the CUDA kernels of csrc/ on the host, thread by thread, so that their indices and their order of copies,
// barriers and collectives can be tested without a device. Copies to shared memory happen when they are waited for, not
// before, and shared memory starts as NaN: a missing wait or barrier gives a wrong result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulate_threads.h"

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaError_t = int;
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }
struct cudaFuncAttributes {};
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13010, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace saap {

struct half {
  _Float16 value;
  half() = default;
  explicit half(float v) : value(static_cast<_Float16>(v)) {}
};
struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float v) {
    uint32_t wide;
    std::memcpy(&wide, &v, 4);
    bits = uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);  // to nearest, ties to even
    if (v != v) bits = 0x7fff;
  }
};

inline float to_float(float v) { return v; }
inline float to_float(half v) { return static_cast<float>(v.value); }
inline float to_float(bfloat16 v) {
  const uint32_t wide = uint32_t(v.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

#define threadIdx (saap::emulated::self().thread)
#define blockIdx (saap::emulated::block->index)

inline uint4 load_streaming(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) throw std::runtime_error("misaligned 16-byte load");
  uint4 result;
  std::memcpy(&result, address, 16);
  return result;
}
inline void synchronise() { emulated::wait(emulated::block->barrier, emulated::block->fibers.size()); }

inline float shuffle_xor(float v, int mask) {
  auto& warp = emulated::warp();
  warp.floats[emulated::lane()] = v;
  emulated::wait_for_warp();
  const float result = warp.floats[emulated::lane() ^ mask];
  emulated::wait_for_warp();
  return result;
}

inline uint32_t shuffle(uint32_t v, int lane) {
  auto& warp = emulated::warp();
  warp.words[emulated::lane()][0] = v;
  emulated::wait_for_warp();
  const uint32_t result = warp.words[lane][0];
  emulated::wait_for_warp();
  return result;
}
inline bool any_lane(bool v) {
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any |= shuffle(v, lane) != 0;
  return any;
}

inline void keep(int&) {}
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t both = low | uint64_t(high) << 32;
  uint32_t result = 0;
  for (int byte = 0; byte < 4; ++byte) result |= uint32_t(both >> 8 * (which >> 4 * byte & 7) & 0xff) << 8 * byte;
  return result;
}
template <typename T>
uint32_t subtract_pairs(uint32_t a, uint32_t b, T) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t bits[2] = {uint16_t(a >> shift), uint16_t(b >> shift)};
    T values[2];
    std::memcpy(values, bits, 4);
    const T difference(to_float(values[0]) - to_float(values[1]));
    uint16_t found;
    std::memcpy(&found, &difference, 2);
    result |= uint32_t(found) << shift;
  }
  return result;
}

inline void copy_async(void* shared, const void* global, int bytes) {
  if (bytes < 0 || bytes > 16 || (bytes != 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    throw std::runtime_error("misaligned or oversized asynchronous copy");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) throw std::runtime_error("misaligned copy target");
  emulated::self().groups.back().push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes});
}
inline void copy_async_once(void* shared, const void* global, int bytes) { copy_async(shared, global, bytes); }
inline void commit_copies() { emulated::self().groups.emplace_back(); }
template <int Newest>
void wait_for_copies_but() {
  auto& groups = emulated::self().groups;
  while (groups.size() > Newest + 1) {  // and the open one
    for (const auto& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

// PTX ISA, ldmatrix .x4 .trans: of matrix i, lane l receives rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared) {
  auto& warp = emulated::warp();
  const size_t l = emulated::lane();
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) throw std::runtime_error("misaligned matrix row");
  warp.addresses[l] = static_cast<const char*>(shared);
  emulated::wait_for_warp();
  for (size_t i = 0; i < 4; ++i) {
    uint16_t values[2];
    for (size_t e = 0; e < 2; ++e) std::memcpy(&values[e], warp.addresses[8 * i + 2 * (l % 4) + e] + 2 * (l / 4), 2);
    r[i] = values[0] | uint32_t(values[1]) << 16;
  }
  emulated::wait_for_warp();
}

// PTX ISA, mma.m16n8k16, fragments of 16-bit A and B and of fp32 C.
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  auto& warp = emulated::warp();
  const size_t l = emulated::lane(), group = l / 4, inside = l % 4;
  std::copy(a, a + 4, warp.words[l]);
  std::copy(b, b + 2, warp.words[l] + 4);
  emulated::wait_for_warp();
  const auto value = [&](size_t lane, size_t word, size_t which) {
    const uint16_t bits = uint16_t(warp.words[lane][word] >> (16 * which));
    T result;
    std::memcpy(&result, &bits, 2);
    return to_float(result);
  };
  for (size_t e = 0; e < 4; ++e) {
    const size_t row = group + 8 * (e / 2), column = 2 * inside + e % 2;
    for (size_t k = 0; k < 16; ++k) {
      const float left = value(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2);
      const float right = value(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      c[e] += left * right;
    }
  }
  emulated::wait_for_warp();
}

inline char* dynamic_shared() {
  const auto start = reinterpret_cast<uintptr_t>(emulated::block->shared.data());
  return reinterpret_cast<char*>((start + 127) / 128 * 128);
}

template <typename Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, void*, const Arguments& arguments) {
  emulated::Block block;
  for (int index = 0; index < threads; ++index) {
    block.fibers.push_back(std::make_unique<emulated::Fiber>());
    block.fibers.back()->thread = dim3(index);
  }
  block.warps.resize((threads + 31) / 32);
  block.body = [&] { kernel(arguments); };
  emulated::block = &block;
  for (unsigned x = 0; x < grid.x; ++x) {
    block.index = dim3(x);
    block.shared.assign(size_t(shared_bytes) + 128, char(0xff));  // NaN in every type
    for (auto& fiber : block.fibers) {
      fiber->done = false;
      fiber->groups.assign(1, {});
    }
    emulated::run_block();
  }
  emulated::block = nullptr;
  return cudaSuccess;
}

}  // namespace saap
