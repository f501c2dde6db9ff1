#pragma once
#include "cuda.h"

using half = Float16<false>;
using __half = half;
struct __half2 {
  half x, y;
};
using half2 = __half2;
inline float __half2float(half x) { return x; }
inline half __float2half(float x) { return x; }
inline half __float2half_rn(float x) { return x; }
