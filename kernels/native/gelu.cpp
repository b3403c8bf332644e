// The operators scalelong_native::gelu_forward and _backward, over contiguous tensors of one size.

#include "gelu.h"

#include <torch/csrc/stable/library.h>

#include "host.h"

namespace {

using namespace scalelong;
using torch::stable::Tensor;

GeluKernels kernels_of(const Tensor& x) {
  static const auto find = SCALELONG_CHOOSE(find_gelu);
  return find(type_of(x));
}

void gelu_forward(Tensor y, Tensor x) {
  const GeluKernels kernels = kernels_of(x);
  in_parallel(x.numel(), 1, [&](int64_t begin, int64_t end) {
    kernels.forward(x.data_ptr(), y.data_ptr(), begin, end);
  });
}

void gelu_backward(Tensor dx, Tensor y, Tensor dy, Tensor x) {
  const GeluKernels kernels = kernels_of(x);
  in_parallel(x.numel(), 1, [&](int64_t begin, int64_t end) {
    kernels.backward(x.data_ptr(), dy.data_ptr(), dx.data_ptr(), y.data_ptr(), begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalelong_native, library) {
  library.def("gelu_forward(Tensor(a!) y, Tensor x) -> ()");
  library.def("gelu_backward(Tensor(a!) dx, Tensor(b!) y, Tensor dy, Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalelong_native, CPU, library) {
  library.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  library.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}
