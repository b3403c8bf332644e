// What the operators share on torch's side: types, threads and the choice of the instruction set.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string_view>

#include "type.h"

namespace scalelong {

// Less work than this is not worth waking another thread (elements).
constexpr int64_t GRAIN = 16384;

#if defined(__x86_64__)
// The best instruction set that the machine has, up to SCALELONG_ISA where that is set: an index into ISAS.
inline int instruction_set() {
  constexpr std::array<std::string_view, 4> ISAS = {"baseline", "avx2", "avx512", "avx512_bf16"};
  const char* asked = std::getenv("SCALELONG_ISA");
  const auto limit = std::find(ISAS.begin(), ISAS.end(), asked ? std::string_view(asked) : ISAS.back());
  STD_TORCH_CHECK(limit != ISAS.end(), "SCALELONG_ISA='", asked, "' is none of baseline, avx2, avx512, avx512_bf16");
  __builtin_cpu_init();
  int best = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    best = __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  }
  return std::min(best, int(limit - ISAS.begin()));
}
#define SCALELONG_CHOOSE(function) \
  (std::array{&baseline::function, &avx2::function, &avx512::function, &avx512_bf16::function}[instruction_set()])
#else
#define SCALELONG_CHOOSE(function) (&baseline::function)
#endif

// What an operator was given for the argument ``name`` must lie in this processor's memory, have this type and so many
// elements, in one dense block: ValueError's sibling below the Python that checks shapes, RuntimeError there.
inline void check_tensor(const char* name, const torch::stable::Tensor& x, torch::headeronly::ScalarType type,
                         int64_t numel) {
  STD_TORCH_CHECK(x.is_cpu(), name, " is no CPU tensor");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " is ", torch::headeronly::toString(x.scalar_type()), ", not ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.numel() == numel, name, " has ", x.numel(), " elements, not ", numel);
}

inline void check_contiguous(const char* name, const torch::stable::Tensor& x, torch::headeronly::ScalarType type,
                             int64_t numel) {
  check_tensor(name, x, type, numel);
  STD_TORCH_CHECK(x.is_contiguous(), name, " is not contiguous");
}

inline Type type_of(const torch::stable::Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16: return Type::bfloat16;
    case torch::headeronly::ScalarType::Half: return Type::float16;
    case torch::headeronly::ScalarType::Float: return Type::float32;
    default: STD_TORCH_CHECK(false, "takes Float, BFloat16 and Half, not ", torch::headeronly::toString(x.scalar_type()));
  }
}

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

template <class F>
void in_parallel(int64_t num_units, int64_t elements_per_unit, const F& f) {
  torch::stable::parallel_for(0, num_units, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements_per_unit)), f);
}

}  // namespace scalelong
