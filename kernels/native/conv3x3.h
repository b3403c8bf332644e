// The gradients of weight and bias of a 3x3 convolution with stride 1 and padding 1, in fp32.
//
// dweight[o, c, i, j] = sum over n, y, x of dout[n, o, y, x] * image[n, c, y + i - 1, x + j - 1]: nine products of
// matrices that share their operands. Both are packed into panels of a few channels, once for all nine, with the pixels
// inside one another; a tile of the result stays in registers while it sums over a block of pixels.
#pragma once

#include <stdint.h>

namespace scalelong {

struct Images {
  const float* data;
  int64_t num_channels;
  int64_t stride_n, stride_c, stride_y, stride_x;
};

struct Size {
  int64_t num_images, height, width;
};

struct Conv3x3Kernels {
  // Channels of a panel of the input and of the output's gradient.
  int64_t input_panel, output_panel;
  // Rows [begin, end) of all images into their place in each panel, with a border of zeros around each image of the input.
  // Of the input a row more above and below each image counts.
  void (*pack_input)(const Images&, const Size&, float* panels, int64_t begin, int64_t end);
  void (*pack_output)(const Images&, const Size&, float* panels, int64_t begin, int64_t end);
  // The gradients for the pairs of panels [begin, end): dweight (O, C, 3, 3), dbias (O). Pair i is the panel
  // i / num_input_panels of the output's gradient with the panel i % num_input_panels of the input.
  void (*sum)(const float* input_panels, const float* output_panels, const Size&, int64_t num_inputs,
              int64_t num_outputs, float* tiles, float* dweight, float* dbias, int64_t begin, int64_t end);
};

namespace baseline {
Conv3x3Kernels find_conv3x3();
}
namespace avx2 {
Conv3x3Kernels find_conv3x3();
}
namespace avx512 {
Conv3x3Kernels find_conv3x3();
}
namespace avx512_bf16 {
using avx512::find_conv3x3;  // fp32 alone
}

}  // namespace scalelong
