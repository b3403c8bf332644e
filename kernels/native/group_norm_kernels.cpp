// Compiled once for each instruction set.

#include "group_norm_channels_last.h"
#include "group_norm_contiguous.h"

namespace scalelong::SCALELONG_ISA {

namespace {

template <class T, class Activation>
GroupNormKernels kernels() {
  return {
      contiguous::forward<T, Activation>,
      contiguous::backward<T, Activation>,
      channels_last::moments<T>,
      channels_last::merge_moments,
      channels_last::statistics<Activation>,
      channels_last::activate_blocks<T, Activation>,
      channels_last::load_statistics<Activation>,
      channels_last::sums<T, Activation>,
      channels_last::merge_sums,
      channels_last::group_sums<Activation>,
      channels_last::gradients<T, Activation>,
      channels_last::sum_dscale,
      WIDTH,
      finish_parameters,
  };
}

template <class T, bool ROUGH>
GroupNormKernels find(Act act) {
  switch (act) {
    case Act::silu: return kernels<T, Silu<ROUGH>>();
    case Act::gelu: return kernels<T, Gelu>();
    case Act::gelu_tanh: return kernels<T, GeluTanh<ROUGH>>();
    default: return kernels<T, Identity>();
  }
}

}  // namespace

GroupNormKernels find_group_norm(Type type, Act act) {
#if defined(__AVX512BF16__)  // which converts bfloat16 and changes nothing else
  return type == Type::bfloat16 ? find<BFloat16, true>(act) : avx512::find_group_norm(type, act);
#else
  switch (type) {
    case Type::bfloat16: return find<BFloat16, true>(act);
    case Type::float16: return find<Float16, false>(act);
    default: return find<float, false>(act);
  }
#endif
}

}  // namespace scalelong::SCALELONG_ISA
