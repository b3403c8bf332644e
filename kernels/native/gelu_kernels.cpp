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

template <class T, class Activation>
void forward(const void* x, void* y, int64_t begin, int64_t end) {
  each_pack(begin, end, [=](auto load, auto store) INLINED { store((T*)y, Activation::value(load((const T*)x))); });
}

template <class T, class Activation>
void backward(const void* x, const void* dy, void* dx, void* y, int64_t begin, int64_t end) {
  each_pack(begin, end, [=](auto load, auto store) INLINED {
    const auto found = Activation::value_and_slope(load((const T*)x));
    store((T*)dx, load((const T*)dy) * found.slope);
    store((T*)y, found.value);
  });
}

template <class T, bool ROUGH>
GeluKernels kernels(bool by_tanh) {
  if (by_tanh) return {forward<T, GeluTanh<ROUGH>>, backward<T, GeluTanh<ROUGH>>};
  return {forward<T, Gelu>, backward<T, Gelu>};
}

}  // namespace

GeluKernels find_gelu(Type type, bool by_tanh) {
#if defined(__AVX512BF16__)  // which converts bfloat16 and changes nothing else
  return type == Type::bfloat16 ? kernels<BFloat16, true>(by_tanh) : avx512::find_gelu(type, by_tanh);
#else
  switch (type) {
    case Type::bfloat16: return kernels<BFloat16, true>(by_tanh);
    case Type::float16: return kernels<Float16, false>(by_tanh);
    default: return kernels<float, false>(by_tanh);
  }
#endif
}

}  // namespace scalelong::SCALELONG_ISA
