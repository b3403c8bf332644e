// Compiled once for each instruction set.

#include "gelu.h"
#include "vector.h"

namespace scalelong::SCALELONG_ISA {

namespace {

constexpr int TOGETHER = 4;

// Calls f(i, load, store) for the packs of a range, and for what is left with packs of one vector.
template <class F>
INLINED inline void each_pack(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + TOGETHER * WIDTH <= end; i += TOGETHER * WIDTH) {
    f([=](auto p) INLINED { return load_pack<TOGETHER>(p + i); },
      [=](auto p, auto x) INLINED { store<false>(p + i, x); });
  }
  for (; i < end; i += WIDTH) {
    const int64_t left = end - i < WIDTH ? end - i : WIDTH;
    f([=](auto p) INLINED { return Pack<1>{load_first(p + i, left)}; },
      [=](auto p, auto x) INLINED { store_first(p + i, x.v[0], left); });
  }
}

template <class T>
void forward(const void* x, void* y, int64_t begin, int64_t end) {
  each_pack(begin, end, [=](auto load, auto store) INLINED { store((T*)y, Gelu::value(load((const T*)x))); });
}

template <class T>
void backward(const void* x, const void* dy, void* dx, void* y, int64_t begin, int64_t end) {
  each_pack(begin, end, [=](auto load, auto store) INLINED {
    const auto z = load((const T*)x), cdf = normal_cdf(z);
    store((T*)dx, load((const T*)dy) * (cdf + z * normal_density(z)));
    store((T*)y, z * cdf);
  });
}

template <class T>
GeluKernels kernels() {
  return {forward<T>, backward<T>};
}

}  // namespace

GeluKernels find_gelu(Type type) {
#if defined(__AVX512BF16__)  // which converts bfloat16 and changes nothing else
  return type == Type::bfloat16 ? kernels<BFloat16>() : avx512::find_gelu(type);
#else
  switch (type) {
    case Type::bfloat16: return kernels<BFloat16>();
    case Type::float16: return kernels<Float16>();
    default: return kernels<float>();
  }
#endif
}

}  // namespace scalelong::SCALELONG_ISA
