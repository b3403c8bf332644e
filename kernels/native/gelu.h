// gelu(x) = x * cdf(x), with the distribution function of the normal distribution or its approximation by tanh, over a
// range of elements.
#pragma once

#include "type.h"

namespace scalelong {

struct GeluKernels {
  void (*forward)(const void* x, void* y, int64_t begin, int64_t end);
  // dx = dy * gelu'(x) and y = gelu(x), for the price of one; dx may be dy.
  void (*backward)(const void* x, const void* dy, void* dx, void* y, int64_t begin, int64_t end);
};

namespace baseline {
GeluKernels find_gelu(Type, bool by_tanh);
}
namespace avx2 {
GeluKernels find_gelu(Type, bool by_tanh);
}
namespace avx512 {
GeluKernels find_gelu(Type, bool by_tanh);
}
namespace avx512_bf16 {
GeluKernels find_gelu(Type, bool by_tanh);
}

}  // namespace scalelong
