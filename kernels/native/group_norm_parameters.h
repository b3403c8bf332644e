// What one channel of one image, and one group, contribute to the formulas; the same in both layouts.
#pragma once

#include "group_norm.h"
#include "vector.h"

namespace scalelong::SCALELONG_ISA {

inline float scale_of(const GroupNorm& norm, int64_t n, int64_t c) {
  if (c < norm.Ch) return 1.0f;
  return norm.scale ? norm.scale[n * norm.scale_stride_n + (c - norm.Ch) * norm.scale_stride_c] : norm.float_scale;
}

// y = xhat * a + b, all parameters in one.
struct Affine {
  float a, b;
};

inline Affine affine_of(const GroupNorm& norm, int64_t n, int64_t c) {
  const int64_t C = norm.Ch + norm.Cs;
  const float gain = norm.gain ? 1.0f + norm.gain[n * C + c] : 1.0f;
  const float shift = norm.shift ? norm.shift[n * C + c] : 0.0f;
  return norm.weight ? Affine{norm.weight[c] * gain, norm.bias[c] * gain + shift} : Affine{gain, shift};
}

inline void add_channel(GroupSums& group, double a, double dz, double dz_xhat) {
  group.dz += a * dz;
  group.dz_xhat += a * dz_xhat;
}

inline void divide(GroupSums& group, double size) {
  group.dz /= size;
  group.dz_xhat /= size;
}

// scale * rstd * (a * dz - mean(a * dz) - xhat * mean(a * dz * xhat)) as dz * from_dz + (x * from_x + constant).
template <class V>
struct GradientOf {
  V from_dz, from_x, constant;
};
using Gradient = GradientOf<float>;

inline Gradient gradient_of(const GroupSums& means, double a, double scale, double mean, double rstd) {
  const double from_xhat = -scale * rstd * means.dz_xhat;
  return {float(scale * rstd * a), float(from_xhat * rstd * scale),
          float(-scale * rstd * means.dz - from_xhat * rstd * mean)};
}

// The sum of s * dx over the positions of a channel. It is what remains where large numbers cancel, so all of it is in
// double precision.
inline float dscale_of(const GroupSums& means, double a, double rstd, double sum_s, double sum_s_xhat, double sum_s_dz) {
  return float(rstd * (a * sum_s_dz - means.dz * sum_s - means.dz_xhat * sum_s_xhat));
}

// dweight and dbias from the sums of the images, whose sum_dz is dshift already; sum_dz_xhat becomes dgain.
inline void finish_parameters(const GroupNorm& norm, int64_t begin, int64_t end) {
  const int64_t C = norm.Ch + norm.Cs;
  for (int64_t c = begin; c < end; ++c) {
    double dweight = 0, dbias = 0;
    for (int64_t i = c; i < norm.N * C; i += C) {
      const double factor = norm.gain ? 1.0 + norm.gain[i] : 1.0;
      dweight += factor * norm.sum_dz_xhat[i];
      dbias += factor * norm.sum_dz[i];
      if (norm.gain && norm.weight) {
        norm.sum_dz_xhat[i] = norm.weight[c] * norm.sum_dz_xhat[i] + norm.bias[c] * norm.sum_dz[i];
      }
    }
    if (norm.dweight) norm.dweight[c] = float(dweight);
    if (norm.dbias) norm.dbias[c] = float(dbias);
  }
}

}  // namespace scalelong::SCALELONG_ISA
