// The operators scalelong_native::gelu_forward and _backward, over contiguous tensors of one size.

#include "gelu.h"

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <utility>

#include "host.h"

namespace {

using namespace scalelong;
using torch::stable::Tensor;

GeluKernels kernels_of(const Tensor& x, bool by_tanh) {
  static const auto find = SCALELONG_CHOOSE(find_gelu);
  return find(type_of(x), by_tanh);
}

// Each tensor has the type and size of x.
void check_alike(const Tensor& x, std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  check_contiguous("gelu: x", x, x.scalar_type(), x.numel());
  for (const auto& [name, tensor] : tensors) check_contiguous(name, *tensor, x.scalar_type(), x.numel());
}

void gelu_forward(Tensor y, Tensor x, bool by_tanh) {
  check_alike(x, {{"gelu: y", &y}});
  const GeluKernels kernels = kernels_of(x, by_tanh);
  // Before the threads: a tensor that is copied on write is copied by the call.
  void *const x_data = x.data_ptr(), *const y_data = y.data_ptr();
  in_parallel(x.numel(), 1, [&](int64_t begin, int64_t end) {
    kernels.forward(x_data, y_data, begin, end);
  });
}

void gelu_backward(Tensor dx, Tensor y, Tensor dy, Tensor x, bool by_tanh) {
  check_alike(x, {{"gelu: dx", &dx}, {"gelu: y", &y}, {"gelu: dy", &dy}});
  const GeluKernels kernels = kernels_of(x, by_tanh);
  void *const x_data = x.data_ptr(), *const dy_data = dy.data_ptr(), *const dx_data = dx.data_ptr(),
             *const y_data = y.data_ptr();
  in_parallel(x.numel(), 1, [&](int64_t begin, int64_t end) {
    kernels.backward(x_data, dy_data, dx_data, y_data, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalelong_native, library) {
  library.def("gelu_forward(Tensor(a!) y, Tensor x, bool by_tanh) -> ()");
  library.def("gelu_backward(Tensor(a!) dx, Tensor(b!) y, Tensor dy, Tensor x, bool by_tanh) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalelong_native, CPU, library) {
  library.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  library.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}
