// Contiguous layout: a group of an image is a run of rows, one a channel, of P elements each.
//
// Forward reads the group twice and backward reads it and dy twice, the second time from the cache.
#pragma once

#include "group_norm_parameters.h"
#include "group_norm_rows.h"

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

// Sums of distances from an origin, of so few elements that single precision serves.
struct Deviations {
  Floats sums[4], squares[4];

  double sum() const { return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }
  double sum_of_squares() const { return sum_of_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])); }
};

template <class T>
inline void add_deviations(Deviations& to, const T* x, int64_t size, float scale, float origin) {
  int64_t i = 0;
  for (; i + 4 * WIDTH <= size; i += 4 * WIDTH) {
    prefetch<4>(x + i + AHEAD);
    for (int k = 0; k < 4; ++k) {
      const Floats distance = load(x + i + k * WIDTH) * scale - origin;
      to.sums[k] += distance;
      to.squares[k] += distance * distance;
    }
  }
  for (; i < size; i += WIDTH) {
    const int64_t left = size - i < WIDTH ? size - i : WIDTH;
    const Floats distance = (load_first(x + i, left) * scale - origin) * first_lanes(left);
    to.sums[0] += distance;
    to.squares[0] += distance * distance;
  }
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
  Deviations deviations{};
  add_deviations(deviations, x, start, scale, rough);
  const float origin = float(rough + deviations.sum() / double(start));
  deviations = {};
  double sum = 0, squares = 0;
  int64_t num_added = 0;
  const auto flush = [&] {
    sum += deviations.sum();
    squares += deviations.sum_of_squares();
    deviations = {};
    num_added = 0;
  };
  for (int64_t c = first; c < last; ++c) {
    const auto [x, scale] = row_of<T>(norm, n, c);
    each_piece(P, [&, x = x, scale = scale](int64_t p, int64_t size) {
      if (num_added + size > PIECE) flush();
      add_deviations(deviations, x + p, size, scale, origin);
      num_added += size;
    });
  }
  flush();
  const double count = double((last - first) * P), distance = sum / count;
  return {origin + distance, squares / count - distance * distance};
}

template <class T, class Activation, bool STREAM>
inline void activate(const T* x, T* y, const T* next, int64_t size, Transform<float> t) {
  const auto apply = [=](auto v) INLINED { return Activation::value((v * t.scale - t.mean) * t.a + t.b); };
  int64_t i = 0;
  for (; i + TOGETHER * WIDTH <= size; i += TOGETHER * WIDTH) {
    prefetch<TOGETHER>(next + i);
    store<STREAM>(y + i, apply(load_pack<TOGETHER>(x + i)));
  }
  for (; i + WIDTH <= size; i += WIDTH) store<STREAM>(y + i, apply(load(x + i)));
  if (i < size) store_first(y + i, apply(load_first(x + i, size - i)), size - i);
}

// Whether rows from c on, up to ``last``, are taken several at a time: all of h or all of s.
inline bool takes_rows(const GroupNorm& norm, int64_t c, int64_t last) {
  return norm.P <= MOST_POSITIONS && c + ROWS <= last && (c + ROWS <= norm.Ch || c >= norm.Ch);
}

template <class T, class Activation>
void forward(const GroupNorm& norm, int64_t begin, int64_t end) {
  const int64_t P = norm.P, C = norm.Ch + norm.Cs, D = C / norm.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / norm.G, first = unit % norm.G * D, last = first + D;
    const Moments moments = moments_of<T>(norm, n, first, last);
    const float mean = float(moments.mean), rstd = float(1.0 / __builtin_sqrt(moments.variance + norm.eps));
    norm.mean[unit] = mean;
    norm.rstd[unit] = rstd;
    T* y = (T*)norm.y + (n * C + first) * P;
    const bool streams = norm.streams && is_aligned(y, WIDTH * sizeof(T)) && is_aligned(y + P, WIDTH * sizeof(T));
    const auto transform_of = [&](int64_t c, float scale) {
      const Affine affine = affine_of(norm, n, c);
      // What the mean loses by rounding goes into the constant, where it costs nothing.
      const double a = double(affine.a) * rstd, b = affine.b - (moments.mean - mean) * a;
      return Transform<float>{scale, mean, float(a * Activation::FACTOR), float(b * Activation::FACTOR)};
    };
    for (int64_t c = first; c < last;) {
      const auto [x, scale] = row_of<T>(norm, n, c);
      if (takes_rows(norm, c, last)) {
        Transform<float> transforms[ROWS];
        for (int k = 0; k < ROWS; ++k) transforms[k] = transform_of(c + k, scale_of(norm, n, c + k));
        const auto run = streams ? activate_rows<T, Activation, true> : activate_rows<T, Activation, false>;
        run(x, y, P, of_rows(transforms));
        c += ROWS;
        y += ROWS * P;
        continue;
      }
      const auto run = streams ? activate<T, Activation, true> : activate<T, Activation, false>;
      // This is bound by arithmetic: meanwhile memory fetches the next group.
      const T* next = unit + 1 < end ? row_of<T>(norm, c + D < C ? n : n + 1, c + D < C ? c + D : c + D - C).x : x;
      run(x, y, next, P, transform_of(c, scale));
      ++c;
      y += P;
    }
  }
  if (norm.streams) finish_streams();
}

// dz = dy * act'(z), kept in ``scratch`` if there is one.
template <class T, class Activation>
inline void first_sweep(const T* x, const T* dy, float* scratch, int64_t size, Transform<float> t, Sums& sums) {
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
inline void second_sweep(const T* x, const T* dy, const float* scratch, T* dx, int64_t size, Transform<float> t, Gradient g,
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

// One group of one image in backward.
template <class T, class Activation>
struct GroupOfImage {
  const GroupNorm& norm;
  int64_t n, first, last;  // channels
  float mean, rstd;
  float* scratch;

  int64_t C() const { return norm.Ch + norm.Cs; }
  const T* x(int64_t c) const { return row_of<T>(norm, n, c).x; }
  const T* dy(int64_t c) const { return (const T*)norm.dy + (n * C() + c) * norm.P; }
  T* dx(int64_t c) const {
    return c < norm.Ch ? (T*)norm.dh + (n * norm.Ch + c) * norm.P : (T*)norm.ds + (n * norm.Cs + c - norm.Ch) * norm.P;
  }
  float* dz(int64_t c, int64_t p = 0) const { return scratch ? scratch + (c - first) * norm.P + p : nullptr; }
  bool is_wanted(int64_t c) const { return (c < norm.Ch ? norm.dh : norm.ds) != nullptr; }
  bool has_dscale(int64_t c) const { return norm.dscale && c >= norm.Ch; }

  Transform<float> transform_of(int64_t c) const {
    const Affine affine = affine_of(norm, n, c);
    return {scale_of(norm, n, c), mean, affine.a * rstd * Activation::FACTOR, affine.b * Activation::FACTOR};
  }
  Transform<OfRows> transform_of_rows(int64_t c) const {
    Transform<float> transforms[ROWS];
    for (int k = 0; k < ROWS; ++k) transforms[k] = transform_of(c + k);
    return of_rows(transforms);
  }

  // Keeps the sums of each row and returns those over the group.
  GroupSums first_sweeps() const {
    GroupSums group = {};
    for (int64_t c = first; c < last;) {
      Sums sums[ROWS] = {};
      const int num_rows = takes_rows(norm, c, last) ? ROWS : 1;
      if (num_rows == ROWS) {
        first_sweep_of_rows<T, Activation>(x(c), dy(c), dz(c), norm.P, transform_of_rows(c), sums);
      } else {
        each_piece(norm.P, [&](int64_t p, int64_t size) {
          first_sweep<T, Activation>(x(c) + p, dy(c) + p, dz(c, p), size, transform_of(c), sums[0]);
        });
      }
      for (int k = 0; k < num_rows; ++k, ++c) keep_sums(c, sums[k], group);
    }
    divide(group, double((last - first) * norm.P));
    return group;
  }

  void second_sweeps(const GroupSums& group) const {
    for (int64_t c = first; c < last;) {
      const int num_rows = takes_rows(norm, c, last) ? ROWS : 1;
      if (is_wanted(c)) {
        const bool streams = norm.streams && is_aligned(dx(c), WIDTH * sizeof(T)) &&
                             (num_rows == 1 || is_aligned(dx(c + 1), WIDTH * sizeof(T)));
        const auto run = streams         ? has_dscale(c) ? &GroupOfImage::second_sweep_of<true, true>
                                                         : &GroupOfImage::second_sweep_of<true, false>
                         : has_dscale(c) ? &GroupOfImage::second_sweep_of<false, true>
                                         : &GroupOfImage::second_sweep_of<false, false>;
        (this->*run)(c, num_rows, group);
      }
      c += num_rows;
    }
  }

 private:
  void keep_sums(int64_t c, const Sums& sums, GroupSums& group) const {
    norm.sum_dz[n * C() + c] = float(sums.dz);
    norm.sum_dz_xhat[n * C() + c] = float(sums.dz_xhat * rstd);
    add_channel(group, affine_of(norm, n, c).a, sums.dz, sums.dz_xhat * rstd);
  }

  template <bool STREAM, bool DSCALE>
  void second_sweep_of(int64_t c, int num_rows, const GroupSums& group) const {
    Sums sums[ROWS] = {};
    Gradient gradients[ROWS];
    for (int k = 0; k < num_rows; ++k) {
      gradients[k] = gradient_of(group, affine_of(norm, n, c + k).a, scale_of(norm, n, c + k), mean, rstd);
    }
    if (num_rows == ROWS) {
      second_sweep_of_rows<T, Activation, STREAM, DSCALE>(x(c), dy(c), dz(c), dx(c), norm.P, transform_of_rows(c),
                                                          of_rows(gradients), sums);
    } else {
      each_piece(norm.P, [&](int64_t p, int64_t size) {
        second_sweep<T, Activation, STREAM, DSCALE>(x(c) + p, dy(c) + p, dz(c, p), dx(c) + p, size, transform_of(c),
                                                    gradients[0], sums[0]);
      });
    }
    for (int k = 0; DSCALE && k < num_rows; ++k) {
      norm.dscale[n * norm.Cs + c + k - norm.Ch] =
          dscale_of(group, affine_of(norm, n, c + k).a, rstd, sums[k].x, sums[k].x_xhat * rstd, sums[k].x_dz);
    }
  }
};

template <class T, class Activation>
void backward(const GroupNorm& norm, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = (norm.Ch + norm.Cs) / norm.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % norm.G * D;
    const GroupOfImage<T, Activation> group{norm,  unit / norm.G,   first,           first + D,
                                            norm.mean[unit], norm.rstd[unit], scratch};
    group.second_sweeps(group.first_sweeps());
  }
  if (norm.streams) finish_streams();
}

}  // namespace scalelong::SCALELONG_ISA::contiguous
