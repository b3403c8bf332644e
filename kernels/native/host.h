// What the operators share on torch's side: types, threads and the choice of the instruction set.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "type.h"

namespace scalelong {

// Less work than this is not worth waking another thread (elements).
constexpr int64_t GRAIN = 16384;

#if defined(__x86_64__)
// The candidate of the best instruction set that the machine has; SCALELONG_ISA=baseline or avx2 chooses less.
template <class F>
F choose_instruction_set(F baseline, F avx2, F avx512) {
  const char* asked = std::getenv("SCALELONG_ISA");
  const std::string_view limit = asked ? asked : "avx512";
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && limit == "avx512") return avx512;
  return has_avx2 && limit != "baseline" ? avx2 : baseline;
}
#define SCALELONG_CHOOSE(function) \
  ::scalelong::choose_instruction_set(&baseline::function, &avx2::function, &avx512::function)
#else
#define SCALELONG_CHOOSE(function) (&baseline::function)
#endif

inline Type type_of(const torch::stable::Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16: return Type::bfloat16;
    case torch::headeronly::ScalarType::Half: return Type::float16;
    default: return Type::float32;
  }
}

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

template <class F>
void in_parallel(int64_t num_units, int64_t elements_per_unit, const F& f) {
  torch::stable::parallel_for(0, num_units, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements_per_unit)), f);
}

}  // namespace scalelong
