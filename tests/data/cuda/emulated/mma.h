#pragma once
#include "cuda.h"

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = row_major>
struct fragment {
  T at[16][16];
};
template <typename F>
void fill_fragment(F& f, float value) {
  for (auto& row : f.at)
    for (auto& element : row) element = value;
}
template <typename Use, int M, int N, int K, typename T, typename Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f, const T* from, unsigned stride) {
  static_assert(M == 16 && N == 16 && K == 16);
  if (uintptr_t(from) % 32 || stride % 8) std::abort();  // what CUDA asks for
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      f.at[i][j] = std::is_same_v<Layout, row_major> ? from[i * stride + j] : from[j * stride + i];
}
template <typename A, typename B, typename C>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  C sum = c;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) sum.at[i][j] += float(a.at[i][k]) * float(b.at[k][j]);
  d = sum;
}
template <typename C>
void store_matrix_sync(float* to, const C& f, unsigned stride, layout_t layout) {
  if (uintptr_t(to) % 32 || stride % 4 || layout != mem_row_major) std::abort();
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i * stride + j] = f.at[i][j];
}
}  // namespace nvcuda::wmma
