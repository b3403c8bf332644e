// Contiguous rows of few positions, several at a time: what a row takes beside its elements, such as constants and the
// latency of exp2 and a division, is shared by them or runs side by side.
#pragma once

#include "group_norm_parameters.h"

namespace scalelong::SCALELONG_ISA::contiguous {

// Rows that are taken together, one behind the other, and up to how many positions they gain by it.
constexpr int ROWS = 4;
constexpr int64_t MOST_POSITIONS = 2 * ROWS * WIDTH;

// A vector for each of the rows.
using OfRows = Pack<ROWS>;

template <class F>
INLINED inline OfRows of_rows(const F& f) {
  OfRows x;
  for (int k = 0; k < ROWS; ++k) x.v[k] = splat(f(k));
  return x;
}

// Of each row, of P positions, a vector from position i on, or what is left of it.
template <class T>
INLINED inline OfRows load_rows(const T* x, int64_t P, int64_t i) {
  OfRows v;
  for (int k = 0; k < ROWS; ++k) v.v[k] = P - i >= WIDTH ? load(x + k * P + i) : load_first(x + k * P + i, P - i);
  return v;
}

template <bool STREAM, class T>
INLINED inline void store_rows(T* y, int64_t P, int64_t i, const OfRows& v) {
  for (int k = 0; k < ROWS; ++k) {
    P - i >= WIDTH ? store<STREAM>(y + k * P + i, v.v[k]) : store_first(y + k * P + i, v.v[k], P - i);
  }
}

// What turns x into the argument of the activation: (x * scale - mean) * a + b. V is a float, or OfRows.
template <class V>
struct Transform {
  V scale, mean, a, b;
};

inline Transform<OfRows> of_rows(const Transform<float> (&t)[ROWS]) {
  return {of_rows([&](int k) { return t[k].scale; }), of_rows([&](int k) { return t[k].mean; }),
          of_rows([&](int k) { return t[k].a; }), of_rows([&](int k) { return t[k].b; })};
}

inline GradientOf<OfRows> of_rows(const GradientOf<float> (&g)[ROWS]) {
  return {of_rows([&](int k) { return g[k].from_dz; }), of_rows([&](int k) { return g[k].from_x; }),
          of_rows([&](int k) { return g[k].constant; })};
}

// Sums over a row. The last three make the gradient of scale, which is what remains when large numbers cancel: they are
// put together in double precision. xhat is still without rstd.
struct Sums {
  double dz, dz_xhat;
  double x, x_xhat, x_dz;
};

template <class T, class Activation, bool STREAM>
inline void activate_rows(const T* x, T* y, int64_t P, const Transform<OfRows>& t) {
  for (int64_t i = 0; i < P; i += WIDTH) {
    store_rows<STREAM>(y, P, i, Activation::value((load_rows(x, P, i) * t.scale - t.mean) * t.a + t.b));
  }
}

// dz = dy * act'(z), kept in ``scratch`` if there is one.
template <class T, class Activation>
inline void first_sweep_of_rows(const T* x, const T* dy, float* scratch, int64_t P, const Transform<OfRows>& t,
                                Sums (&sums)[ROWS]) {
  OfRows sum{}, sum_xhat{};
  for (int64_t i = 0; i < P; i += WIDTH) {
    const OfRows xhat = load_rows(x, P, i) * t.scale - t.mean;
    const OfRows dz = Activation::times_derivative(load_rows(dy, P, i), xhat * t.a + t.b);
    sum = sum + dz;
    sum_xhat = sum_xhat + dz * xhat;
    if (scratch) store_rows<false>(scratch, P, i, dz);
  }
  for (int k = 0; k < ROWS; ++k) {
    sums[k].dz = sum_of_lanes(sum.v[k]);
    sums[k].dz_xhat = sum_of_lanes(sum_xhat.v[k]);
  }
}

template <class T, class Activation, bool STREAM, bool DSCALE>
inline void second_sweep_of_rows(const T* x, const T* dy, const float* scratch, T* dx, int64_t P,
                                 const Transform<OfRows>& t, const GradientOf<OfRows>& g, Sums (&sums)[ROWS]) {
  OfRows sum{}, sum_xhat{}, sum_dz{};
  for (int64_t i = 0; i < P; i += WIDTH) {
    const OfRows v = load_rows(x, P, i), xhat = v * t.scale - t.mean;
    const OfRows dz = scratch ? load_rows(scratch, P, i)
                              : Activation::times_derivative(load_rows(dy, P, i), xhat * t.a + t.b);
    if constexpr (DSCALE) {
      sum = sum + v;
      sum_xhat = sum_xhat + v * xhat;
      sum_dz = sum_dz + v * dz;
    }
    store_rows<STREAM>(dx, P, i, dz * g.from_dz + (v * g.from_x + g.constant));
  }
  for (int k = 0; DSCALE && k < ROWS; ++k) {
    sums[k].x = sum_of_lanes(sum.v[k]);
    sums[k].x_xhat = sum_of_lanes(sum_xhat.v[k]);
    sums[k].x_dz = sum_of_lanes(sum_dz.v[k]);
  }
}

}  // namespace scalelong::SCALELONG_ISA::contiguous
