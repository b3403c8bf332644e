// One call of the fused residual sum and LayerNorm: stream = x + gate * branch, y = normalised(stream) * a + c with
// a = weight * (1 + gain) and c = bias * (1 + gain) + shift; where there are angles, y turned by them: each pair
// (i, i + D / 2) of its elements by an angle of its own.
//
// B samples of T rows of D elements: element (b, t, d) is at (b * T + t) * D + d. Where nothing belongs to a sample, all
// rows may be one. A unit of work is a block of rows of one sample, b * num_blocks + block.
#pragma once

#include "type.h"

namespace scalelong {

struct AddLayerNorm {
  int64_t B, T, D;
  int64_t rows_per_block, num_blocks;  // blocks of a sample
  float eps;
  bool streams;  // writes past the caches what is too large to be found there by the next operator

  const void *x, *branch;  // forward; backward reads branch for the gradient of the gate alone. Null where there is none
  const float *weight, *bias;         // (D), or null for 1 and 0
  const float *gain, *shift, *gate;   // (B, D), or null for 0, 0 and 1
  const float *cosine, *sine;         // (B, D / 2) of the angles, or null
  void *stream, *y;                   // null stream: there is no branch, and x is the stream
  float *mean, *rstd;                 // (B, T)

  const void *dstream, *dy;  // backward; dstream may be null. The stream is in x
  void *dx, *dbranch;        // or null where nobody needs them
  // (B, num_blocks, NUM_SUMS, D), of dy turned back, the same times xhat, branch * dx, and, half as long, what the
  // angles' gradients sum up; or null.
  float* sums;
  float *dweight, *dbias;    // (D), or null
  float *dgain, *dshift, *dgate;  // (B, D), or null
  float* dangle;                  // (B, D / 2), or null
};
constexpr int64_t NUM_SUMS = 4;
constexpr int64_t ROWS_TOGETHER = 4;  // in backward, for which the sums are loaded and stored once

constexpr int64_t SCRATCH_ROWS = 2 + ROWS_TOGETHER;

struct AddLayerNormKernels {
  // ``scratch`` has room for SCRATCH_ROWS * D floats.
  using Rows = void (*)(const AddLayerNorm&, int64_t begin, int64_t end, float* scratch);

  Rows forward, backward;
  // The gradients of weight, bias, gain, shift, gate and angle from ``sums``, over a range of D.
  void (*parameters_D)(const AddLayerNorm&, int64_t begin, int64_t end);
};

namespace baseline {
AddLayerNormKernels find_add_layer_norm(Type stream, Type branch, Type y);
}
namespace avx2 {
AddLayerNormKernels find_add_layer_norm(Type stream, Type branch, Type y);
}
namespace avx512 {
AddLayerNormKernels find_add_layer_norm(Type stream, Type branch, Type y);
}
namespace avx512_bf16 {
using avx512::find_add_layer_norm;
}

}  // namespace scalelong
