// Contiguous layout: a group of an image is a run of rows, one a channel, of P elements each.
//
// Forward reads the group twice and backward reads it and dy twice, the second time from the cache.
#pragma once

#include "group_norm_parameters.h"

namespace scalelong::SCALELONG_ISA::contiguous {

// Elements that are summed in single precision before they go into a sum in double precision.
constexpr int64_t PIECE = 2048;
// How far ahead memory is asked for what comes next in the same row, or in the row behind it (elements).
constexpr int64_t AHEAD = 512;
// Vectors that are taken together.
constexpr int TOGETHER = 4;
// Elements whose mean is near enough to that of their group.
constexpr int64_t SAMPLE = 256;

template <class T>
struct Row {
  const T* x;
  float scale;
};

template <class T>
inline Row<T> row_of(const GroupNorm& norm, int64_t n, int64_t c) {
  if (c < norm.Ch) return {(const T*)norm.h + (n * norm.Ch + c) * norm.P, 1.0f};
  const int64_t k = c - norm.Ch;
  return {(const T*)norm.s + (n * norm.Cs + k) * norm.P, scale_of(norm, n, c)};
}

// Calls f(p, size) for the pieces of a row, whose sums are short enough for single precision.
template <class F>
inline void each_piece(int64_t P, const F& f) {
  for (int64_t p = 0; p < P; p += PIECE) f(p, P - p < PIECE ? P - p : PIECE);
}

struct Deviations {
  double sum, squares;
};

template <class T>
inline Deviations deviations_of(const T* x, int64_t size, float scale, float origin) {
  Floats sums[4] = {}, squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * WIDTH <= size; i += 4 * WIDTH) {
    prefetch<4>(x + i + AHEAD);
    for (int k = 0; k < 4; ++k) {
      const Floats distance = load(x + i + k * WIDTH) * scale - origin;
      sums[k] += distance;
      squares[k] += distance * distance;
    }
  }
  for (; i < size; i += WIDTH) {
    const int64_t left = size - i < WIDTH ? size - i : WIDTH;
    const Floats distance = (load_first(x + i, left) * scale - origin) * first_lanes(left);
    sums[0] += distance;
    squares[0] += distance * distance;
  }
  return {sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])),
          sum_of_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]))};
}

struct Moments {
  double mean, variance;
};

// In one reading, by distances from the mean of the group's first elements. However far from zero the numbers are, that
// origin lies within sqrt(group / SAMPLE) standard deviations of their mean, so that next to no digits are lost.
template <class T>
inline Moments moments_of(const GroupNorm& norm, int64_t n, int64_t first, int64_t last) {
  const int64_t P = norm.P;
  const auto [x, scale] = row_of<T>(norm, n, first);
  const int64_t start = P < SAMPLE ? P : SAMPLE;
  const float rough = to_float(x[0]) * scale;
  const float origin = float(rough + deviations_of(x, start, scale, rough).sum / double(start));
  double sum = 0, squares = 0;
  for (int64_t c = first; c < last; ++c) {
    const auto [x, scale] = row_of<T>(norm, n, c);
    each_piece(P, [&, x = x, scale = scale](int64_t p, int64_t size) {
      const Deviations deviations = deviations_of(x + p, size, scale, origin);
      sum += deviations.sum;
      squares += deviations.squares;
    });
  }
  const double count = double((last - first) * P), distance = sum / count;
  return {origin + distance, squares / count - distance * distance};
}

template <class T, class Activation, bool STREAM>
inline void activate(const T* x, T* y, const T* next, int64_t size, float scale, float mean, float a, float b) {
  const auto apply = [=](auto v) INLINED { return Activation::value((v * scale - mean) * a + b); };
  int64_t i = 0;
  for (; i + TOGETHER * WIDTH <= size; i += TOGETHER * WIDTH) {
    prefetch<TOGETHER>(next + i);
    store<STREAM>(y + i, apply(load_pack<TOGETHER>(x + i)));
  }
  for (; i + WIDTH <= size; i += WIDTH) store<STREAM>(y + i, apply(load(x + i)));
  if (i < size) store_first(y + i, apply(load_first(x + i, size - i)), size - i);
}

template <class T, class Activation>
void forward(const GroupNorm& norm, int64_t begin, int64_t end) {
  const int64_t P = norm.P, C = norm.Ch + norm.Cs, D = C / norm.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / norm.G, first = unit % norm.G * D;
    const Moments moments = moments_of<T>(norm, n, first, first + D);
    const float mean = float(moments.mean), rstd = float(1.0 / __builtin_sqrt(moments.variance + norm.eps));
    norm.mean[unit] = mean;
    norm.rstd[unit] = rstd;
    for (int64_t c = first; c < first + D; ++c) {
      const auto [x, scale] = row_of<T>(norm, n, c);
      const Affine affine = affine_of(norm, n, c);
      T* y = (T*)norm.y + (n * C + c) * P;
      const auto run =
          norm.streams && is_aligned(y, WIDTH * sizeof(T)) ? activate<T, Activation, true> : activate<T, Activation, false>;
      // What the mean loses by rounding goes into the constant, where it costs nothing.
      const double a = double(affine.a) * rstd, b = affine.b - (moments.mean - mean) * a;
      // This is bound by arithmetic: meanwhile memory fetches the next group.
      const T* next = unit + 1 < end ? row_of<T>(norm, c + D < C ? n : n + 1, (c + D) % C).x : x;
      run(x, y, next, P, scale, mean, float(a * Activation::FACTOR), float(b * Activation::FACTOR));
    }
  }
  if (norm.streams) finish_streams();
}

// Sums over a row. The last three make the gradient of scale, which is what remains when large numbers cancel: they are
// put together in double precision. xhat is still without rstd.
struct Sums {
  double dz, dz_xhat;
  double x, x_xhat, x_dz;
};

// What turns x into the argument of the activation: (x * scale - mean) * a + b.
struct Transform {
  float scale, mean, a, b;
};

// dz = dy * act'(z), kept in ``scratch`` if there is one.
template <class T, class Activation>
inline void first_sweep(const T* x, const T* dy, float* scratch, int64_t size, Transform t, Sums& sums) {
  Floats sum = {}, sum_xhat = {};
  const auto step = [&]<int NUM>(const Pack<NUM>& v, const Pack<NUM>& d) INLINED {
    const auto xhat = v * t.scale - t.mean;
    const auto dz = Activation::times_derivative(d, xhat * t.a + t.b);
    sum += sum_by<1>(dz).v[0];
    sum_xhat += sum_by<1>(dz * xhat).v[0];
    return dz;
  };
  int64_t i = 0;
  for (; i + TOGETHER * WIDTH <= size; i += TOGETHER * WIDTH) {
    const auto dz = step(load_pack<TOGETHER>(x + i), load_pack<TOGETHER>(dy + i));
    if (scratch) store<false>(scratch + i, dz);
  }
  for (; i < size; i += WIDTH) {
    const int64_t left = size - i < WIDTH ? size - i : WIDTH;
    const auto dz = step(Pack<1>{load_first(x + i, left)}, Pack<1>{load_first(dy + i, left)});
    if (scratch) store_first(scratch + i, dz.v[0], left);
  }
  sums.dz += sum_of_lanes(sum);
  sums.dz_xhat += sum_of_lanes(sum_xhat);
}

template <class T, class Activation, bool STREAM, bool DSCALE>
inline void second_sweep(const T* x, const T* dy, const float* scratch, T* dx, int64_t size, Transform t, Gradient g,
                         Sums& sums) {
  Floats sum[2] = {}, sum_xhat[2] = {}, sum_dz[2] = {};
  const auto step = [&](int k, Floats v, Floats dz) {
    if constexpr (DSCALE) {
      sum[k] += v;
      sum_xhat[k] += v * (v * t.scale - t.mean);
      sum_dz[k] += v * dz;
    }
    return dz * g.from_dz + (v * g.from_x + g.constant);
  };
  const auto dz_of = [&](Floats v, Floats d) {
    return Activation::times_derivative(d, (v * t.scale - t.mean) * t.a + t.b);
  };
  int64_t i = 0;
  for (; i + 2 * WIDTH <= size; i += 2 * WIDTH) {
    for (int k = 0; k < 2; ++k) {
      const int64_t j = i + k * WIDTH;
      const Floats v = load(x + j), dz = scratch ? load(scratch + j) : dz_of(v, load(dy + j));
      store<STREAM>(dx + j, step(k, v, dz));
    }
  }
  for (; i < size; i += WIDTH) {
    const int64_t left = size - i < WIDTH ? size - i : WIDTH;
    const Floats v = load_first(x + i, left);
    const Floats dz = scratch ? load_first(scratch + i, left) : dz_of(v, load_first(dy + i, left));
    store_first(dx + i, step(0, v, dz), left);
  }
  if constexpr (DSCALE) {
    sums.x += sum_of_lanes(sum[0] + sum[1]);
    sums.x_xhat += sum_of_lanes(sum_xhat[0] + sum_xhat[1]);
    sums.x_dz += sum_of_lanes(sum_dz[0] + sum_dz[1]);
  }
}

template <class T, class Activation>
void backward(const GroupNorm& norm, int64_t begin, int64_t end, float* scratch) {
  const int64_t P = norm.P, C = norm.Ch + norm.Cs, D = C / norm.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / norm.G, first = unit % norm.G * D;
    const float mean = norm.mean[unit], rstd = norm.rstd[unit];
    const auto scratch_of = [&](int64_t c) { return scratch ? scratch + (c - first) * P : nullptr; };
    const auto transform_of = [&](float scale, Affine affine) {
      return Transform{scale, mean, affine.a * rstd * Activation::FACTOR, affine.b * Activation::FACTOR};
    };
    GroupSums group = {};
    for (int64_t c = first; c < first + D; ++c) {
      const auto [x, scale] = row_of<T>(norm, n, c);
      const Affine affine = affine_of(norm, n, c);
      const Transform transform = transform_of(scale, affine);
      const T* dy = (const T*)norm.dy + (n * C + c) * P;
      float* dz = scratch_of(c);
      Sums sums = {};
      each_piece(P, [&, x = x](int64_t p, int64_t size) {
        first_sweep<T, Activation>(x + p, dy + p, dz ? dz + p : dz, size, transform, sums);
      });
      norm.sum_dz[n * C + c] = float(sums.dz);
      norm.sum_dz_xhat[n * C + c] = float(sums.dz_xhat * rstd);
      add_channel(group, affine.a, sums.dz, sums.dz_xhat * rstd);
    }
    divide(group, double(D * P));
    for (int64_t c = first; c < first + D; ++c) {
      if ((c < norm.Ch ? norm.dh : norm.ds) == nullptr) continue;
      const auto [x, scale] = row_of<T>(norm, n, c);
      const Affine affine = affine_of(norm, n, c);
      const Transform transform = transform_of(scale, affine);
      const Gradient gradient = gradient_of(group, affine.a, scale, mean, rstd);
      const T* dy = (const T*)norm.dy + (n * C + c) * P;
      T* dx = c < norm.Ch ? (T*)norm.dh + (n * norm.Ch + c) * P : (T*)norm.ds + (n * norm.Cs + c - norm.Ch) * P;
      const float* dz = scratch_of(c);
      const bool streams = norm.streams && is_aligned(dx, WIDTH * sizeof(T)), has_dscale = norm.dscale && c >= norm.Ch;
      const auto run = streams      ? has_dscale ? second_sweep<T, Activation, true, true>
                                                 : second_sweep<T, Activation, true, false>
                       : has_dscale ? second_sweep<T, Activation, false, true>
                                    : second_sweep<T, Activation, false, false>;
      Sums sums = {};
      each_piece(P, [&, x = x](int64_t p, int64_t size) {
        run(x + p, dy + p, dz ? dz + p : dz, dx + p, size, transform, gradient, sums);
      });
      if (has_dscale) {
        norm.dscale[n * norm.Cs + c - norm.Ch] = dscale_of(group, affine.a, rstd, sums.x, sums.x_xhat * rstd, sums.x_dz);
      }
    }
  }
  if (norm.streams) finish_streams();
}

}  // namespace scalelong::SCALELONG_ISA::contiguous
