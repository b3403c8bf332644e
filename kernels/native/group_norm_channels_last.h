// Channels last: each position is a row of channels, so that the statistics of a group need the whole image.
//
// Forward: moments of blocks of rows -> statistics of groups -> activation. Backward: sums of blocks -> sums of groups
// -> gradients. A unit of the first and the last step is a block of rows, one of the step between is a group.
#pragma once

#include "group_norm_parameters.h"

namespace scalelong::SCALELONG_ISA::channels_last {

// Rows are walked in strips of so many channels: their parameters and sums stay in the first cache, and memory still
// sees long runs.
constexpr int64_t STRIP = 256, ROWS = 16;
// Rows whose mean is near enough to that of their block.
constexpr int64_t SAMPLE = 8;
// How many rows ahead memory is asked for a strip.
constexpr int64_t AHEAD = 4;

// The channels of h, or those of s behind them.
struct Segment {
  int64_t first, size;
};

inline int64_t segments_of(const GroupNorm& norm, Segment (&segments)[2]) {
  segments[0] = {0, norm.Ch};
  segments[1] = {norm.Ch, norm.Cs};
  return norm.Cs > 0 ? 2 : 1;
}

struct Block {
  int64_t n, first_row, num_rows;
};

inline Block block_of(const GroupNorm& norm, const Walk& walk, int64_t unit) {
  const int64_t first_row = unit % walk.num_blocks * walk.rows_per_block, left = norm.P - first_row;
  return {walk.first_n + unit / walk.num_blocks, first_row, left < walk.rows_per_block ? left : walk.rows_per_block};
}

// Element (first_row, first channel of the segment) of the tensor that the segment comes from, h or s.
template <class T, class Pointer>
inline T* source_of(const GroupNorm& norm, Pointer h, Pointer s, const Segment& segment, const Block& block) {
  return (T*)(segment.first == 0 ? h : s) + (block.n * norm.P + block.first_row) * segment.size;
}

// Which of an image's channel_values hold what.
// A and B turn scale * x - mean into the argument of the activation.
enum { SCALE, MEAN, A, B, FROM_DZ, FROM_X, CONSTANT };
static_assert(CONSTANT + 1 == NUM_CHANNEL_VALUES);

inline float* channel_row(const Walk& walk, int64_t n, int64_t which) {
  return walk.channel_values + ((n - walk.first_n) * NUM_CHANNEL_VALUES + which) * walk.channel_stride;
}

inline float* partial_row(const Walk& walk, int64_t unit, int64_t which) {
  return walk.partials + (unit * NUM_PARTIALS + which) * walk.channel_stride;
}

// How much of a vector of channels is there.
struct Whole {};
struct First {
  int64_t size;
};

// Calls f(row, c, Whole or First) for each vector of a segment's channels in each row.
template <class F>
inline void each_vector(const Segment& segment, int64_t num_rows, const F& f) {
  for (int64_t first_row = 0; first_row < num_rows; first_row += ROWS) {
    const int64_t last_row = first_row + ROWS < num_rows ? first_row + ROWS : num_rows;
    for (int64_t strip = 0; strip < segment.size; strip += STRIP) {
      const int64_t last = strip + STRIP < segment.size ? strip + STRIP : segment.size;
      for (int64_t row = first_row; row < last_row; ++row) {
        int64_t c = strip;
        for (; c + WIDTH <= last; c += WIDTH) f(row, c, Whole{});
        if (c < last) f(row, c, First{last - c});
      }
    }
  }
}

template <class T>
inline Floats load(const T* p, Whole) {
  return SCALELONG_ISA::load(p);
}
template <class T>
inline Floats load(const T* p, First first) {
  return load_first(p, first.size);
}

template <bool STREAM, class T>
inline void store(T* p, Floats x, Whole) {
  SCALELONG_ISA::store<STREAM>(p, x);
}
template <bool STREAM, class T>
inline void store(T* p, Floats x, First first) {
  store_first(p, x, first.size);
}

inline Floats load(const float* p) { return SCALELONG_ISA::load(p); }

inline void clear(float* p, int64_t size) { memset(p, 0, size * sizeof(float)); }

// partials: mean and sum of squared distances from it, for each channel of each block, before scaling.
template <class T>
void moments(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  Segment segments[2];
  const int64_t num_segments = segments_of(norm, segments);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(norm, walk, unit);
    for (int64_t k = 0; k < num_segments; ++k) {
      const Segment segment = segments[k];
      const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
      float* sums = partial_row(walk, unit, 0) + segment.first;
      float* squares = partial_row(walk, unit, 1) + segment.first;
      float* origins = partial_row(walk, unit, 2) + segment.first;
      clear(sums, segment.size);
      clear(squares, segment.size);
      clear(origins, segment.size);
      // Distances from the mean of a few rows lose no digits to a mean that is far from zero, nor to one outlier.
      const int64_t few = block.num_rows < SAMPLE ? block.num_rows : SAMPLE;
      each_vector(segment, few, [=](int64_t row, int64_t c, auto part) {
        store<false>(origins + c, load(origins + c, part) + load(x + row * segment.size + c, part), part);
      });
      each_vector(segment, 1, [=](int64_t, int64_t c, auto part) {
        store<false>(origins + c, load(origins + c, part) / float(few), part);
      });
      each_vector(segment, block.num_rows, [=](int64_t row, int64_t c, auto part) {
        prefetch<1>(x + (row + AHEAD) * segment.size + c);
        const Floats distance = load(x + row * segment.size + c, part) - load(origins + c, part);
        store<false>(sums + c, load(sums + c, part) + distance, part);
        store<false>(squares + c, load(squares + c, part) + distance * distance, part);
      });
      each_vector(segment, 1, [=](int64_t, int64_t c, auto part) {
        const Floats sum = load(sums + c, part), distance = sum / float(block.num_rows);
        store<false>(squares + c, load(squares + c, part) - sum * distance, part);
        store<false>(sums + c, load(origins + c, part) + distance, part);
      });
    }
  }
}

inline int64_t rows_in_block(const GroupNorm& norm, const Walk& walk, int64_t b) {
  const int64_t left = norm.P - b * walk.rows_per_block;
  return left < walk.rows_per_block ? left : walk.rows_per_block;
}

template <class Activation>
void statistics(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t C = norm.Ch + norm.Cs, D = C / norm.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = walk.first_n + unit / norm.G, g = unit % norm.G, first_block = (n - walk.first_n) * walk.num_blocks;
    const auto each = [&](const auto& f) {
      for (int64_t b = 0; b < walk.num_blocks; ++b) {
        const float *means = partial_row(walk, first_block + b, 0), *squares = partial_row(walk, first_block + b, 1);
        const double rows = double(rows_in_block(norm, walk, b));
        for (int64_t c = g * D; c < (g + 1) * D; ++c) f(rows, double(scale_of(norm, n, c)), means[c], squares[c]);
      }
    };
    double sum = 0, total = 0;
    each([&](double rows, double scale, double mean, double) { sum += rows * scale * mean; });
    const double mean = sum / double(D * norm.P);
    each([&](double rows, double scale, double block_mean, double squares) {
      const double distance = scale * block_mean - mean;
      total += scale * scale * squares + rows * distance * distance;
    });
    const float rstd = float(1.0 / __builtin_sqrt(total / double(D * norm.P) + norm.eps));
    norm.mean[n * norm.G + g] = float(mean);
    norm.rstd[n * norm.G + g] = rstd;
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const Affine affine = affine_of(norm, n, c);
      const double a = double(affine.a) * rstd;
      channel_row(walk, n, SCALE)[c] = scale_of(norm, n, c);
      channel_row(walk, n, MEAN)[c] = float(mean);
      channel_row(walk, n, A)[c] = float(a * Activation::FACTOR);
      // What the mean loses by rounding goes into the constant, where it costs nothing.
      channel_row(walk, n, B)[c] = float((affine.b - (mean - float(mean)) * a) * Activation::FACTOR);
    }
  }
}

template <class T, class Activation, bool STREAM>
inline void activate(const GroupNorm& norm, const Walk& walk, int64_t unit) {
  const int64_t C = norm.Ch + norm.Cs;
  const Block block = block_of(norm, walk, unit);
  const float *scales = channel_row(walk, block.n, SCALE), *means = channel_row(walk, block.n, MEAN);
  const float *as = channel_row(walk, block.n, A), *bs = channel_row(walk, block.n, B);
  Segment segments[2];
  const int64_t num_segments = segments_of(norm, segments);
  for (int64_t k = 0; k < num_segments; ++k) {
    const Segment segment = segments[k];
    const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
    T* y = (T*)norm.y + (block.n * norm.P + block.first_row) * C + segment.first;
    each_vector(segment, block.num_rows, [=](int64_t row, int64_t c, auto part) {
      const int64_t i = segment.first + c;
      prefetch<1>(x + (row + AHEAD) * segment.size + c);
      const Floats xhat = load(x + row * segment.size + c, part) * load(scales + i) - load(means + i);
      store<STREAM>(y + row * C + c, Activation::value(xhat * load(as + i) + load(bs + i)), part);
    });
  }
}

// Whether the first elements of all rows of a tensor with this many channels lie on the boundary of a vector.
template <class T>
inline bool rows_are_aligned(const void* p, int64_t num_channels) {
  return p == nullptr || (is_aligned(p, WIDTH * sizeof(T)) && num_channels % WIDTH == 0);
}

template <class T, class Activation>
void activate_blocks(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const bool streams = norm.streams && rows_are_aligned<T>(norm.y, norm.Ch + norm.Cs) && norm.Ch % WIDTH == 0;
  // Backwards: the rows that were read last are still in the cache.
  for (int64_t unit = end; unit-- > begin;) {
    streams ? activate<T, Activation, true>(norm, walk, unit) : activate<T, Activation, false>(norm, walk, unit);
  }
}

template <class Activation>
void load_statistics(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t D = (norm.Ch + norm.Cs) / norm.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = walk.first_n + unit / norm.G, g = unit % norm.G;
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const Affine affine = affine_of(norm, n, c);
      channel_row(walk, n, SCALE)[c] = scale_of(norm, n, c);
      channel_row(walk, n, MEAN)[c] = norm.mean[n * norm.G + g];
      channel_row(walk, n, A)[c] = affine.a * norm.rstd[n * norm.G + g] * Activation::FACTOR;
      channel_row(walk, n, B)[c] = affine.b * Activation::FACTOR;
    }
  }
}

// partials: the sums over a block's rows of dz = dy * act'(z) and of dz * xhat, still without rstd.
template <class T, class Activation>
void sums(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t C = norm.Ch + norm.Cs;
  Segment segments[2];
  const int64_t num_segments = segments_of(norm, segments);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(norm, walk, unit);
    const float *scales = channel_row(walk, block.n, SCALE), *means = channel_row(walk, block.n, MEAN);
    const float *as = channel_row(walk, block.n, A), *bs = channel_row(walk, block.n, B);
    float *sums_dz = partial_row(walk, unit, 0), *sums_dz_xhat = partial_row(walk, unit, 1);
    clear(sums_dz, C);
    clear(sums_dz_xhat, C);
    for (int64_t k = 0; k < num_segments; ++k) {
      const Segment segment = segments[k];
      const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
      const T* dy = (const T*)norm.dy + (block.n * norm.P + block.first_row) * C + segment.first;
      each_vector(segment, block.num_rows, [=](int64_t row, int64_t c, auto part) {
        const int64_t i = segment.first + c;
        prefetch<1>(x + (row + AHEAD) * segment.size + c);
        prefetch<1>(dy + (row + AHEAD) * C + c);
        const Floats xhat = load(x + row * segment.size + c, part) * load(scales + i) - load(means + i);
        const Floats dz = load(dy + row * C + c, part) * Activation::derivative(xhat * load(as + i) + load(bs + i));
        store<false>(sums_dz + i, load(sums_dz + i, part) + dz, part);
        store<false>(sums_dz_xhat + i, load(sums_dz_xhat + i, part) + dz * xhat, part);
      });
    }
  }
}

template <class Activation>
void group_sums(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t C = norm.Ch + norm.Cs, D = C / norm.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = walk.first_n + unit / norm.G, g = unit % norm.G, first_block = (n - walk.first_n) * walk.num_blocks;
    const float mean = norm.mean[n * norm.G + g], rstd = norm.rstd[n * norm.G + g];
    GroupSums& group = walk.group_sums[unit];
    group = {};
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      double dz = 0, dz_xhat = 0;
      for (int64_t b = 0; b < walk.num_blocks; ++b) {
        dz += partial_row(walk, first_block + b, 0)[c];
        dz_xhat += partial_row(walk, first_block + b, 1)[c];
      }
      norm.sum_dz[n * C + c] = float(dz);
      norm.sum_dz_xhat[n * C + c] = float(dz_xhat * rstd);
      add_channel(group, affine_of(norm, n, c).a, dz, dz_xhat * rstd);
    }
    divide(group, double(D * norm.P));
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const Gradient gradient = gradient_of(group, affine_of(norm, n, c).a, scale_of(norm, n, c), mean, rstd);
      channel_row(walk, n, FROM_DZ)[c] = gradient.from_dz;
      channel_row(walk, n, FROM_X)[c] = gradient.from_x;
      channel_row(walk, n, CONSTANT)[c] = gradient.constant;
    }
  }
}

// partials: the sums over a block's rows of s, s * xhat (without rstd) and s * dz, which make the gradient of scale.
template <class T, class Activation, bool STREAM, bool DSCALE>
inline void gradients_of(const GroupNorm& norm, const Walk& walk, int64_t unit, const Segment& segment) {
  const int64_t C = norm.Ch + norm.Cs;
  const Block block = block_of(norm, walk, unit);
  const auto values_of = [&](int which) { return channel_row(walk, block.n, which) + segment.first; };
  const float *scales = values_of(SCALE), *means = values_of(MEAN), *as = values_of(A), *bs = values_of(B);
  const float *from_dzs = values_of(FROM_DZ), *from_xs = values_of(FROM_X), *constants = values_of(CONSTANT);
  const auto sums_of = [&](int which) { return partial_row(walk, unit, which) + segment.first; };
  float *sums = sums_of(0), *sums_xhat = sums_of(1), *sums_dz = sums_of(2);
  const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
  const T* dy = (const T*)norm.dy + (block.n * norm.P + block.first_row) * C + segment.first;
  T* dx = source_of<T>(norm, norm.dh, norm.ds, segment, block);
  if constexpr (DSCALE) {
    clear(sums, segment.size);
    clear(sums_xhat, segment.size);
    clear(sums_dz, segment.size);
  }
  each_vector(segment, block.num_rows, [=](int64_t row, int64_t c, auto part) {
    prefetch<1>(x + (row + AHEAD) * segment.size + c);
    prefetch<1>(dy + (row + AHEAD) * C + c);
    const Floats v = load(x + row * segment.size + c, part), xhat = v * load(scales + c) - load(means + c);
    const Floats dz = load(dy + row * C + c, part) * Activation::derivative(xhat * load(as + c) + load(bs + c));
    if constexpr (DSCALE) {
      store<false>(sums + c, load(sums + c, part) + v, part);
      store<false>(sums_xhat + c, load(sums_xhat + c, part) + v * xhat, part);
      store<false>(sums_dz + c, load(sums_dz + c, part) + v * dz, part);
    }
    const Floats gradient = dz * load(from_dzs + c) + (v * load(from_xs + c) + load(constants + c));
    store<STREAM>(dx + row * segment.size + c, gradient, part);
  });
}

template <class T, class Activation>
void gradients(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const bool streams = norm.streams && rows_are_aligned<T>(norm.dh, norm.Ch) && rows_are_aligned<T>(norm.ds, norm.Cs);
  Segment segments[2];
  const int64_t num_segments = segments_of(norm, segments);
  for (int64_t unit = end; unit-- > begin;) {
    for (int64_t k = 0; k < num_segments; ++k) {
      const bool has_dscale = norm.dscale && k == 1;
      const auto run = streams      ? has_dscale ? gradients_of<T, Activation, true, true>
                                                 : gradients_of<T, Activation, true, false>
                       : has_dscale ? gradients_of<T, Activation, false, true>
                                    : gradients_of<T, Activation, false, false>;
      run(norm, walk, unit, segments[k]);
    }
  }
}

inline void sum_dscale(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t D = (norm.Ch + norm.Cs) / norm.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = walk.first_n + unit;
    for (int64_t k = 0; k < norm.Cs; ++k) {
      const int64_t c = norm.Ch + k, g = c / D;
      double x = 0, x_xhat = 0, x_dz = 0;
      for (int64_t b = 0; b < walk.num_blocks; ++b) {
        x += partial_row(walk, unit * walk.num_blocks + b, 0)[c];
        x_xhat += partial_row(walk, unit * walk.num_blocks + b, 1)[c];
        x_dz += partial_row(walk, unit * walk.num_blocks + b, 2)[c];
      }
      const double rstd = norm.rstd[n * norm.G + g];
      norm.dscale[n * norm.Cs + k] =
          dscale_of(walk.group_sums[unit * norm.G + g], affine_of(norm, n, c).a, rstd, x, x_xhat * rstd, x_dz);
    }
  }
}

}  // namespace scalelong::SCALELONG_ISA::channels_last
