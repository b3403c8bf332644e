// One call of the fused GroupNorm: y = act((normalised(cat([h, scale * s], 1)) * weight + bias) * (1 + gain) + shift).
//
// N images of C = Ch + Cs channels with P positions each, in G groups of C / G channels.
// Contiguous: element (n, c, p) of a tensor with C channels is at (n * C + c) * P + p. Channels last: (n * P + p) * C + c.
#pragma once

#include "type.h"

namespace scalelong {

enum class Act { none, silu, gelu, gelu_tanh };

struct GroupNorm {
  int64_t N, Ch, Cs, P, G;
  Type type;
  Act act;
  float eps;
  bool streams;  // writes past the caches what is too large to be found there by the next operator

  const void *h, *s;  // s is null where Cs is 0
  float float_scale;
  const float* scale;  // null for float_scale
  int64_t scale_stride_n, scale_stride_c;
  const float *weight, *bias, *gain, *shift;  // (C), (C), (N, C), (N, C); null for 1, 0, 0, 0
  float *mean, *rstd;                         // (N, G)

  void* y;  // forward

  const void* dy;  // backward
  void *dh, *ds;  // null where nobody wants it; ds is there where dscale is
  float *sum_dz, *sum_dz_xhat;  // (N, C): over the positions, with dz the gradient before the activation
  float *dweight, *dbias;       // (C), or null
  float* dscale;                // (N, Cs), or null
};

// Sums over a group, then means: of a * dz and of a * dz * xhat, where y = act(xhat * a + b) and dz = dy * act'(z).
struct GroupSums {
  double dz, dz_xhat;
};

// Channels last only: the images and groups that are walked together, so few that memory is read once and the second
// sweep finds them in the last cache; and what is known of them between two steps.
struct Walk {
  int64_t first_n, first_g, num_groups;
  int64_t rows_per_block, num_blocks;           // blocks of an image
  int64_t channel_stride;                       // the channels of those groups, of h and s each in whole vectors
  float* partials;                              // (images, num_blocks, NUM_PARTIALS, channel_stride)
  float* channel_values;                        // (images, NUM_CHANNEL_VALUES, channel_stride)
  GroupSums* group_sums;                        // (images, num_groups)
  float* dz;                                    // (images, P, channels of those groups), or null to compute it twice
};
constexpr int64_t NUM_PARTIALS = 3, NUM_CHANNEL_VALUES = 7;

// What each build of group_norm_kernels.cpp offers: functions over a range of units of work.
struct GroupNormKernels {
  using Step = void (*)(const GroupNorm&, int64_t begin, int64_t end);
  using WalkStep = void (*)(const GroupNorm&, const Walk&, int64_t begin, int64_t end);

  // Contiguous: a unit is a group of an image, n * G + g.
  Step forward;
  // ``scratch`` holds the dz of one group, or is null to compute it twice.
  void (*backward)(const GroupNorm&, int64_t begin, int64_t end, float* scratch);

  // Channels last, in this order. A unit is a block of rows (B), a vector of channels (V), a group (G) or an image (N).
  WalkStep moments_B, merge_moments_V, statistics_G, activate_B;
  WalkStep load_statistics_G, sums_B, merge_sums_V, group_sums_G, gradients_B, sum_dscale_N;
  int64_t width;  // of a vector

  // Either layout, after all others. A unit is a channel.
  Step parameters_C;
};

// Which functions serve a type and an activation.
namespace baseline {
GroupNormKernels find_group_norm(Type, Act);
}
namespace avx2 {
GroupNormKernels find_group_norm(Type, Act);
}
namespace avx512 {
GroupNormKernels find_group_norm(Type, Act);
}
namespace avx512_bf16 {
GroupNormKernels find_group_norm(Type, Act);
}

}  // namespace scalelong
