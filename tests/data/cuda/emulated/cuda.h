// What generated kernels for tensor cores use of CUDA, on a processor: every thread of a block is a thread here, blocks
// run one after the other, and a tile of matrix is held whole by each lane of a warp. tests/stages/test_tensor_cores.py
// compiles a kernel's source with these headers in place of CUDA's.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)

struct Index {
  int x, y, z;
};
inline thread_local Index threadIdx, blockIdx;
inline pthread_barrier_t barrier;
inline void __syncthreads() { pthread_barrier_wait(&barrier); }
// What a launch grants a block, 16 bits of NaN before a kernel writes to it.
alignas(64) inline unsigned char buf_dyn_shmem_ptr[49152];

struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// A float of 16 bits, rounded to the nearest, ties to even, after every operation.
template <bool kBrain>
struct Float16 {
  uint16_t bits;
  Float16() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  Float16(T number) {
    float value = float(number);
    if constexpr (kBrain) {
      uint32_t wide;
      std::memcpy(&wide, &value, 4);
      bits = uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
    } else {
      _Float16 narrow = _Float16(value);
      std::memcpy(&bits, &narrow, 2);
    }
  }
  operator float() const {
    if constexpr (kBrain) {
      uint32_t wide = uint32_t(bits) << 16;
      float value;
      std::memcpy(&value, &wide, 4);
      return value;
    } else {
      _Float16 narrow;
      std::memcpy(&narrow, &bits, 2);
      return float(narrow);
    }
  }
  friend Float16 operator+(Float16 a, Float16 b) { return float(a) + float(b); }
  friend Float16 operator-(Float16 a, Float16 b) { return float(a) - float(b); }
  friend Float16 operator*(Float16 a, Float16 b) { return float(a) * float(b); }
};
template <bool kBrain>
bool __hgt(Float16<kBrain> a, Float16<kBrain> b) { return float(a) > float(b); }
template <bool kBrain>
bool __hlt(Float16<kBrain> a, Float16<kBrain> b) { return float(a) < float(b); }

template <typename Kernel>
void launch(Index grid, Index block, Kernel kernel) {
  int count = block.x * block.y * block.z;
  for (int z = 0; z < grid.z; ++z)
    for (int y = 0; y < grid.y; ++y)
      for (int x = 0; x < grid.x; ++x) {
        std::memset(buf_dyn_shmem_ptr, 0xFF, sizeof buf_dyn_shmem_ptr);
        pthread_barrier_init(&barrier, nullptr, count);
        std::vector<std::thread> threads;
        for (int i = 0; i < count; ++i)
          threads.emplace_back([=] {
            blockIdx = {x, y, z};
            threadIdx = {i % block.x, i / block.x % block.y, i / block.x / block.y};
            kernel();
          });
        for (auto& each : threads) each.join();
        pthread_barrier_destroy(&barrier);
      }
}
