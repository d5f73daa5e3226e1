// What kernels need of the device, behind names that a host emulator can provide too (tests/kernels/emulator).
#pragma once

#include <cstdint>

#ifdef SAAP_EMULATE
#include "emulate_cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace saap {

#ifndef SAAP_EMULATE

using half = __half;
using bfloat16 = __nv_bfloat16;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(half v) { return __half2float(v); }
__device__ inline float to_float(bfloat16 v) { return __bfloat162float(v); }

__device__ inline uint4 load_streaming(const void* address) { return __ldcs(static_cast<const uint4*>(address)); }
__device__ inline void synchronise() { __syncthreads(); }
__device__ inline float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ inline uint32_t shuffle(uint32_t v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
__device__ inline bool any_lane(bool v) { return __any_sync(0xffffffffu, v); }
__device__ inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t which) {
  return __byte_perm(low, high, which);
}

// Keeps a value in its register: compilers would rather compute it again in every round of a loop.
__device__ inline void keep(int& v) { asm volatile("" : "+r"(v)); }

// Two 16-bit differences in one register.
__device__ inline uint32_t subtract_pairs(uint32_t a, uint32_t b, half) {
  const __half2 difference = __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(difference);
}
__device__ inline uint32_t subtract_pairs(uint32_t a, uint32_t b, bfloat16) {
  const __nv_bfloat162 difference =
      __hsub2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(difference);
}

// 16 bytes to shared memory without a register: `bytes` of them from global memory, the rest zeros.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}
// The same for what is read once: it is the first to leave the L2 cache.
__device__ inline void copy_async_once(void* shared, const void* global, int bytes) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(target), "l"(global),
               "r"(bytes), "l"(policy)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Newest>
__device__ inline void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Newest) : "memory");
}

// Four 8x8 matrices of 16-bit values, transposed: lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared) {
  const uint32_t source = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(source)
               : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8) on tensor cores.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

// Runs kernel(arguments); returns the error of this launch.
template <typename Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, void* stream,
           const Arguments& arguments) {
  if (shared_bytes > 48 * 1024) {
    const auto function = reinterpret_cast<const void*>(kernel);
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  return cudaGetLastError();
}

#endif

// Two 16-bit values in one register, or two floats.
template <typename T>
struct Pair {
  uint32_t bits;
  __device__ void set(T first, T second) {
    uint16_t low, high;
    memcpy(&low, &first, 2);
    memcpy(&high, &second, 2);
    bits = low | uint32_t(high) << 16;
  }
  __device__ float get(int which) const {
    const uint16_t value = uint16_t(which == 0 ? bits : bits >> 16);
    T result;
    memcpy(&result, &value, 2);
    return to_float(result);
  }
};

template <>
struct Pair<float> {
  float values[2];
  __device__ void set(float first, float second) { values[0] = first, values[1] = second; }
  __device__ float get(int which) const { return values[which]; }
};

}  // namespace saap
