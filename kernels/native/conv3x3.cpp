// The operators scalelong_native::conv3x3_scratch and conv3x3_weight_grad.

#include "conv3x3.h"

#include <torch/csrc/stable/library.h>

#include "host.h"

namespace {

using namespace scalelong;
using torch::stable::Tensor;

const Conv3x3Kernels& kernels() {
  static const Conv3x3Kernels found = SCALELONG_CHOOSE(find_conv3x3)();
  return found;
}

int64_t num_panels(int64_t num_channels, int64_t panel) { return (num_channels + panel - 1) / panel; }

// Floats of each part of the scratch memory.
struct Scratch {
  Scratch(const Size& size, int64_t num_inputs, int64_t num_outputs)
      : input_panels(num_panels(num_inputs, kernels().input_panel)),
        output_panels(num_panels(num_outputs, kernels().output_panel)),
        inputs(input_panels * kernels().input_panel * size.num_images * (size.height + 2) * (size.width + 2)),
        outputs(output_panels * kernels().output_panel * size.num_images * size.height * size.width),
        tiles(input_panels * kernels().input_panel * output_panels * kernels().output_panel * 9) {}

  int64_t input_panels, output_panels, inputs, outputs, tiles;
};

Images images_of(const Tensor& x) {
  return {(const float*)x.data_ptr(), x.size(1), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

Size size_of_images(const Tensor& x) { return {x.size(0), x.size(2), x.size(3)}; }

void check_images(const Tensor& dout, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && dout.dim() == 4, "conv3x3: x and dout need four dimensions");
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, "conv3x3: x has no pixels");
  check_tensor("conv3x3: x", x, torch::headeronly::ScalarType::Float, x.numel());
  check_tensor("conv3x3: dout", dout, torch::headeronly::ScalarType::Float,
               x.size(0) * dout.size(1) * x.size(2) * x.size(3));
  STD_TORCH_CHECK(dout.size(0) == x.size(0) && dout.size(2) == x.size(2), "conv3x3: dout is of other images than x");
}

int64_t conv3x3_scratch(Tensor dout, Tensor x) {
  check_images(dout, x);
  const Scratch scratch(size_of_images(x), x.size(1), dout.size(1));
  return scratch.inputs + scratch.outputs + scratch.tiles;
}

// dweight (O, C, 3, 3) and dbias (O) contiguous, dout (N, O, H, W) and x (N, C, H, W) in any layout, all fp32.
void conv3x3_weight_grad(Tensor dweight, Tensor dbias, Tensor scratch, Tensor dout, Tensor x) {
  check_images(dout, x);
  const Size size = size_of_images(x);
  const Images inputs = images_of(x), outputs = images_of(dout);
  const Scratch parts(size, inputs.num_channels, outputs.num_channels);
  const auto check = [](const char* name, const Tensor& tensor, int64_t numel) {
    check_contiguous(name, tensor, torch::headeronly::ScalarType::Float, numel);
  };
  check("conv3x3: dweight", dweight, outputs.num_channels * inputs.num_channels * 9);
  check("conv3x3: dbias", dbias, outputs.num_channels);
  check("conv3x3: scratch", scratch, parts.inputs + parts.outputs + parts.tiles);
  float *const dweight_data = (float*)dweight.data_ptr(), *const dbias_data = (float*)dbias.data_ptr();
  float* const input_panels = (float*)scratch.data_ptr();
  float* const output_panels = input_panels + parts.inputs;
  float* const tiles = output_panels + parts.outputs;
  in_parallel(size.num_images * (size.height + 2), size.width * inputs.num_channels, [&](int64_t begin, int64_t end) {
    kernels().pack_input(inputs, size, input_panels, begin, end);
  });
  in_parallel(size.num_images * size.height, size.width * outputs.num_channels, [&](int64_t begin, int64_t end) {
    kernels().pack_output(outputs, size, output_panels, begin, end);
  });
  in_parallel(parts.output_panels * parts.input_panels, GRAIN, [&](int64_t begin, int64_t end) {
    kernels().sum(input_panels, output_panels, size, inputs.num_channels, outputs.num_channels, tiles,
                  dweight_data, dbias_data, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalelong_native, library) {
  library.def("conv3x3_scratch(Tensor dout, Tensor x) -> int");
  library.def(
      "conv3x3_weight_grad(Tensor(a!) dweight, Tensor(b!) dbias, Tensor(c!) scratch, Tensor dout, Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalelong_native, CPU, library) {
  library.impl("conv3x3_scratch", TORCH_BOX(&conv3x3_scratch));
  library.impl("conv3x3_weight_grad", TORCH_BOX(&conv3x3_weight_grad));
}
