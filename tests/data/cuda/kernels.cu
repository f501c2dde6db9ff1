// Kernels that differ in what the assembler says of them; tests/stages/test_device_code.py reads kernels.fatbin.gz, made
// of them by nvcc 13.0.88 for sm_80 and sm_90, against ptxas.log, what `-Xptxas -v` printed meanwhile.
#include <mma.h>

extern "C" __global__ void matrix(const half* a, const half* b, float* c) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, half, row_major> fa;
  fragment<matrix_b, 16, 16, 16, half, col_major> fb;
  fragment<accumulator, 16, 16, 16, float> fc;
  fill_fragment(fc, 0.f);
  load_matrix_sync(fa, a, 16);
  load_matrix_sync(fb, b, 16);
  mma_sync(fc, fa, fb, fc);
  store_matrix_sync(c, fc, 16, mem_row_major);
}

extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x, int n) {
  float r[40];
  for (int i = 0; i < 40; ++i) r[i] = x[i * 32 + threadIdx.x];
  for (int k = 0; k < n; ++k)
    for (int i = 0; i < 40; ++i) r[i] = r[i] * r[(i + 7) % 40] + x[k * 40 + i];
  for (int i = 1; i < 40; ++i) r[0] += r[i];
  x[threadIdx.x] = r[0];
}

extern "C" __global__ void shared(float* x, int n) {
  __shared__ double s[64];
  extern __shared__ float dynamic[];
  s[threadIdx.x] = x[n];
  dynamic[threadIdx.x] = x[n + 1];
  __syncthreads();
  x[threadIdx.x] = s[63 - threadIdx.x] + dynamic[n];
}

extern "C" __global__ void stack(float* x, int n, int m) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i];
  for (int i = 0; i < n; ++i) a[x[i] > 0 ? (i * 7) % 64 : i % 64] += 1;
  x[0] = a[m % 64];
}
