// Channels last: each position is a row of channels, so that the statistics of a group need the whole image.
//
// Forward: moments of blocks of rows -> statistics of groups -> activation. Backward: sums of blocks -> sums of groups
// -> gradients. A unit of the first and the last step is a block of rows, one of the step between is a group.
#pragma once

#include "group_norm_parameters.h"

namespace scalelong::SCALELONG_ISA::channels_last {

// Rows are walked in strips of so many channels: what is known of a channel stays in the first cache, and memory still
// sees long runs.
constexpr int64_t STRIP = 256, ROWS = 16;
// Rows that go side by side, so that what is known of a channel is loaded once for them.
constexpr int64_t TOGETHER = 4;
// How many rows ahead memory is asked for a strip.
constexpr int64_t AHEAD = 4;
// Rows whose mean is near enough to that of their block.
constexpr int64_t SAMPLE = 8;

// Those channels of a walk that h holds, or those that s holds.
struct Segment {
  bool is_skip;
  int64_t first, size;    // in that tensor
  int64_t num_channels;   // of that tensor
  int64_t first_vector;   // records of s begin behind those of h; each segment's last vector may be partly filled
};

inline int64_t vectors_of(int64_t num_channels) { return (num_channels + WIDTH - 1) / WIDTH; }

struct Channels {
  int64_t first, last;
};

inline Channels channels_of(const GroupNorm& norm, const Walk& walk) {
  const int64_t D = (norm.Ch + norm.Cs) / norm.G;
  return {walk.first_g * D, (walk.first_g + walk.num_groups) * D};
}

// How many of a walk's channels h holds.
inline int64_t num_hidden(const GroupNorm& norm, const Channels& channels) {
  const int64_t last = channels.last < norm.Ch ? channels.last : norm.Ch;
  return last > channels.first ? last - channels.first : 0;
}

template <class F>
inline void each_segment(const GroupNorm& norm, const Walk& walk, const F& f) {
  const Channels channels = channels_of(norm, walk);
  const int64_t hidden = num_hidden(norm, channels), skip = channels.last - channels.first - hidden;
  if (hidden > 0) f(Segment{false, channels.first, hidden, norm.Ch, 0});
  if (skip > 0) f(Segment{true, channels.first + hidden - norm.Ch, skip, norm.Cs, vectors_of(hidden)});
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
  return (T*)(segment.is_skip ? s : h) + (block.n * norm.P + block.first_row) * segment.num_channels + segment.first;
}

// Element (first_row, first channel of the segment) of a tensor of all channels.
template <class T, class Pointer>
inline T* joint_of(const GroupNorm& norm, Pointer p, const Segment& segment, const Block& block) {
  const int64_t c = segment.is_skip ? norm.Ch + segment.first : segment.first;
  return (T*)p + (block.n * norm.P + block.first_row) * (norm.Ch + norm.Cs) + c;
}

// The same of a walk's dz.
inline float* dz_of(const GroupNorm& norm, const Walk& walk, const Segment& segment, const Block& block) {
  if (walk.dz == nullptr) return nullptr;
  const Channels channels = channels_of(norm, walk);
  const int64_t c = segment.is_skip ? num_hidden(norm, channels) : 0;
  const int64_t row = (block.n - walk.first_n) * norm.P + block.first_row;
  return walk.dz + row * (channels.last - channels.first) + c;
}

// What is known of the channels lies in records, one a vector of channels, so that one pointer reaches all of it.
// SIZE counts the vectors of a record; of which one, a name says.
template <int SIZE>
struct Records {
  float* begin;

  Floats get(int64_t vector, int which) const { return load(begin + (vector * SIZE + which) * WIDTH); }
  void set(int64_t vector, int which, Floats x) const { store<false>(begin + (vector * SIZE + which) * WIDTH, x); }

  // One channel: ``lane`` by Lanes.
  float& at(int64_t lane, int which) const {
    return begin[(lane / WIDTH * SIZE + which) * WIDTH + lane % WIDTH];
  }
};

// Where a channel stands in the records of a walk.
struct Lanes {
  int64_t first, hidden;

  int64_t operator()(int64_t c) const {
    const int64_t k = c - first;
    return k < hidden ? k : k - hidden + vectors_of(hidden) * WIDTH;
  }
};

inline Lanes lanes_of(const GroupNorm& norm, const Walk& walk) {
  const Channels channels = channels_of(norm, walk);
  return {channels.first, num_hidden(norm, channels)};
}

// A and B turn scale * x - mean into the argument of the activation.
enum { SCALE, MEAN, A, B, FROM_DZ, FROM_X, CONSTANT };
static_assert(CONSTANT + 1 == NUM_CHANNEL_VALUES);
using Values = Records<NUM_CHANNEL_VALUES>;

inline Values values_of(const Walk& walk, int64_t n) {
  return {walk.channel_values + (n - walk.first_n) * NUM_CHANNEL_VALUES * walk.channel_stride};
}

// Sums over the rows of a block, three of them.
using Partials = Records<NUM_PARTIALS>;

inline Partials partials_of(const Walk& walk, int64_t unit) {
  return {walk.partials + unit * NUM_PARTIALS * walk.channel_stride};
}

inline void clear(const Walk& walk, const Partials& partials) {
  memset(partials.begin, 0, NUM_PARTIALS * walk.channel_stride * sizeof(float));
}

// How much of a vector of channels is there.
struct Whole {};
struct First {
  int64_t size;
};

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

template <int64_t NUM>
struct Rows {
  static constexpr int64_t num = NUM;
};

// Calls f(row, rows, c, vector, part) for each vector of a segment's channels in each ``rows.num`` rows.
template <class F>
INLINED inline void each_vector(const Segment& segment, int64_t num_rows, const F& f) {
  const auto strip_of_rows = [&](int64_t row, auto rows, int64_t strip, int64_t last) INLINED {
    int64_t c = strip, vector = segment.first_vector + strip / WIDTH;
    for (; c + WIDTH <= last; c += WIDTH) f(row, rows, c, vector++, Whole{});
    if (c < last) f(row, rows, c, vector, First{last - c});
  };
  for (int64_t first_row = 0; first_row < num_rows; first_row += ROWS) {
    const int64_t last_row = first_row + ROWS < num_rows ? first_row + ROWS : num_rows;
    for (int64_t strip = 0; strip < segment.size; strip += STRIP) {
      const int64_t last = strip + STRIP < segment.size ? strip + STRIP : segment.size;
      int64_t row = first_row;
      for (; row + TOGETHER <= last_row; row += TOGETHER) strip_of_rows(row, Rows<TOGETHER>{}, strip, last);
      for (; row < last_row; ++row) strip_of_rows(row, Rows<1>{}, strip, last);
    }
  }
}

// Partials of a channel before scaling: its mean is ORIGIN + DISTANCE, and SQUARES the sum of squared distances from it.
enum { ORIGIN, DISTANCE, SQUARES };

template <class T>
void moments(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(norm, walk, unit);
    const Partials partials = partials_of(walk, unit);
    clear(walk, partials);
    each_segment(norm, walk, [&](const Segment& segment) {
      const int64_t size = segment.num_channels;
      const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
      // Distances from the mean of a few rows lose no digits to a mean that is far from zero, nor to one outlier.
      const int64_t few = block.num_rows < SAMPLE ? block.num_rows : SAMPLE;
      each_vector(segment, few, [=](int64_t row, auto rows, int64_t c, int64_t vector, auto part) INLINED {
        Floats origin = partials.get(vector, ORIGIN);
        for (int64_t r = row; r < row + rows.num; ++r) origin += load(x + r * size + c, part) / float(few);
        partials.set(vector, ORIGIN, origin);
      });
      each_vector(segment, block.num_rows, [=](int64_t row, auto rows, int64_t c, int64_t vector, auto part) INLINED {
        const Floats origin = partials.get(vector, ORIGIN);
        Floats sum = partials.get(vector, DISTANCE), squares = partials.get(vector, SQUARES);
        for (int64_t r = row; r < row + rows.num; ++r) {
          prefetch<1>(x + (r + AHEAD) * size + c);
          const Floats distance = load(x + r * size + c, part) - origin;
          sum += distance;
          squares += distance * distance;
        }
        partials.set(vector, DISTANCE, sum);
        partials.set(vector, SQUARES, squares);
      });
      each_vector(segment, 1, [=](int64_t, auto, int64_t, int64_t vector, auto) {
        const Floats sum = partials.get(vector, DISTANCE), distance = sum / float(block.num_rows);
        partials.set(vector, DISTANCE, distance);
        partials.set(vector, SQUARES, partials.get(vector, SQUARES) - sum * distance);
      });
    });
  }
}

// The moments of all rows of an image, into the partials of its first block. A unit is a vector of an image's channels.
inline void merge_moments(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t num_vectors = walk.channel_stride / WIDTH;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first_block = unit / num_vectors * walk.num_blocks, vector = unit % num_vectors;
    const Partials merged = partials_of(walk, first_block);
    const auto rows_of = [&](int64_t b) { return float(block_of(norm, walk, b).num_rows); };
    const auto distance_of = [&](int64_t b) {  // from the first block's origin
      const Partials partials = partials_of(walk, first_block + b);
      return (partials.get(vector, ORIGIN) - merged.get(vector, ORIGIN)) + partials.get(vector, DISTANCE);
    };
    Floats distance{}, squares{};
    for (int64_t b = 0; b < walk.num_blocks; ++b) distance += distance_of(b) * rows_of(b);
    distance /= float(norm.P);
    for (int64_t b = 0; b < walk.num_blocks; ++b) {
      const Floats off = distance_of(b) - distance;
      squares += partials_of(walk, first_block + b).get(vector, SQUARES) + off * off * rows_of(b);
    }
    merged.set(vector, DISTANCE, distance);
    merged.set(vector, SQUARES, squares);
  }
}

template <class Activation>
void statistics(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t D = (norm.Ch + norm.Cs) / norm.G;
  const Lanes lane_of = lanes_of(norm, walk);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = walk.first_n + unit / walk.num_groups, g = walk.first_g + unit % walk.num_groups;
    const Partials partials = partials_of(walk, (n - walk.first_n) * walk.num_blocks);
    const auto mean_of = [&](int64_t c) {
      return scale_of(norm, n, c) * (double(partials.at(lane_of(c), ORIGIN)) + partials.at(lane_of(c), DISTANCE));
    };
    double sum = 0, total = 0;
    for (int64_t c = g * D; c < (g + 1) * D; ++c) sum += mean_of(c);
    const double mean = sum / double(D);
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const double scale = scale_of(norm, n, c), distance = mean_of(c) - mean;
      total += scale * scale * partials.at(lane_of(c), SQUARES) + double(norm.P) * distance * distance;
    }
    const float rstd = float(1.0 / __builtin_sqrt(total / double(D * norm.P) + norm.eps));
    norm.mean[n * norm.G + g] = float(mean);
    norm.rstd[n * norm.G + g] = rstd;
    const Values values = values_of(walk, n);
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const Affine affine = affine_of(norm, n, c);
      const double a = double(affine.a) * rstd;
      values.at(lane_of(c), SCALE) = scale_of(norm, n, c);
      values.at(lane_of(c), MEAN) = float(mean);
      values.at(lane_of(c), A) = float(a * Activation::FACTOR);
      // What the mean loses by rounding goes into the constant, where it costs nothing.
      values.at(lane_of(c), B) = float((affine.b - (mean - float(mean)) * a) * Activation::FACTOR);
    }
  }
}

template <class T, class Activation, bool STREAM>
inline void activate(const GroupNorm& norm, const Walk& walk, int64_t unit) {
  const Block block = block_of(norm, walk, unit);
  const Values values = values_of(walk, block.n);
  const int64_t C = norm.Ch + norm.Cs;
  each_segment(norm, walk, [&](const Segment& segment) {
    const int64_t size = segment.num_channels;
    const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
    T* y = joint_of<T>(norm, norm.y, segment, block);
    each_vector(segment, block.num_rows, [=](int64_t row, auto rows, int64_t c, int64_t vector, auto part) INLINED {
      const Floats scale = values.get(vector, SCALE), mean = values.get(vector, MEAN);
      const Floats a = values.get(vector, A), b = values.get(vector, B);
      for (int64_t r = row; r < row + rows.num; ++r) {
        prefetch<1>(x + (r + AHEAD) * size + c);
        const Floats xhat = load(x + r * size + c, part) * scale - mean;
        store<STREAM>(y + r * C + c, Activation::value(xhat * a + b), part);
      }
    });
  });
}

// Whether in all rows of a tensor the element of channel c lies on the boundary of a vector.
template <class T>
inline bool rows_are_aligned(const void* p, int64_t num_channels, int64_t c) {
  return is_aligned(p, WIDTH * sizeof(T)) && num_channels % WIDTH == 0 && c % WIDTH == 0;
}

template <class T, class Activation>
void activate_blocks(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const Channels channels = channels_of(norm, walk);
  const bool streams = norm.streams && rows_are_aligned<T>(norm.y, norm.Ch + norm.Cs, channels.first) &&
                       (channels.first + num_hidden(norm, channels)) % WIDTH == 0;
  // Backwards: the rows that were read last are still in the cache.
  for (int64_t unit = end; unit-- > begin;) {
    streams ? activate<T, Activation, true>(norm, walk, unit) : activate<T, Activation, false>(norm, walk, unit);
  }
}

template <class Activation>
void load_statistics(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t D = (norm.Ch + norm.Cs) / norm.G;
  const Lanes lane_of = lanes_of(norm, walk);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = walk.first_n + unit / walk.num_groups, g = walk.first_g + unit % walk.num_groups;
    const Values values = values_of(walk, n);
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const Affine affine = affine_of(norm, n, c);
      values.at(lane_of(c), SCALE) = scale_of(norm, n, c);
      values.at(lane_of(c), MEAN) = norm.mean[n * norm.G + g];
      values.at(lane_of(c), A) = affine.a * norm.rstd[n * norm.G + g] * Activation::FACTOR;
      values.at(lane_of(c), B) = affine.b * Activation::FACTOR;
    }
  }
}

// Partials: of dz = dy * act'(z) and of dz * xhat, still without rstd.
enum { SUM_DZ, SUM_DZ_XHAT };

template <class T, class Activation>
void sums(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t C = norm.Ch + norm.Cs, num_channels = channels_of(norm, walk).last - channels_of(norm, walk).first;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(norm, walk, unit);
    const Values values = values_of(walk, block.n);
    const Partials partials = partials_of(walk, unit);
    clear(walk, partials);
    each_segment(norm, walk, [&](const Segment& segment) {
      const int64_t size = segment.num_channels;
      const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
      const T* dy = joint_of<const T>(norm, norm.dy, segment, block);
      float* kept = dz_of(norm, walk, segment, block);
      each_vector(segment, block.num_rows, [=](int64_t row, auto rows, int64_t c, int64_t vector, auto part) INLINED {
        const Floats scale = values.get(vector, SCALE), mean = values.get(vector, MEAN);
        const Floats a = values.get(vector, A), b = values.get(vector, B);
        Floats sum = partials.get(vector, SUM_DZ), sum_xhat = partials.get(vector, SUM_DZ_XHAT);
        for (int64_t r = row; r < row + rows.num; ++r) {
          prefetch<1>(x + (r + AHEAD) * size + c);
          prefetch<1>(dy + (r + AHEAD) * C + c);
          const Floats xhat = load(x + r * size + c, part) * scale - mean;
          const Floats dz = Activation::times_derivative(load(dy + r * C + c, part), xhat * a + b);
          if (kept) store<false>(kept + r * num_channels + c, dz, part);
          sum += dz;
          sum_xhat += dz * xhat;
        }
        partials.set(vector, SUM_DZ, sum);
        partials.set(vector, SUM_DZ_XHAT, sum_xhat);
      });
    });
  }
}

// The sums over all rows of an image, into the partials of its first block. A unit is a vector of an image's channels.
inline void merge_sums(const GroupNorm&, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t num_vectors = walk.channel_stride / WIDTH;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first_block = unit / num_vectors * walk.num_blocks, vector = unit % num_vectors;
    for (int which = 0; which < NUM_PARTIALS; ++which) {
      Floats sum{};
      for (int64_t b = 0; b < walk.num_blocks; ++b) sum += partials_of(walk, first_block + b).get(vector, which);
      partials_of(walk, first_block).set(vector, which, sum);
    }
  }
}

template <class Activation>
void group_sums(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t C = norm.Ch + norm.Cs, D = C / norm.G;
  const Lanes lane_of = lanes_of(norm, walk);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = walk.first_n + unit / walk.num_groups, g = walk.first_g + unit % walk.num_groups;
    const Partials partials = partials_of(walk, (n - walk.first_n) * walk.num_blocks);
    const float mean = norm.mean[n * norm.G + g], rstd = norm.rstd[n * norm.G + g];
    GroupSums& group = walk.group_sums[unit];
    group = {};
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const double dz = partials.at(lane_of(c), SUM_DZ), dz_xhat = partials.at(lane_of(c), SUM_DZ_XHAT);
      norm.sum_dz[n * C + c] = float(dz);
      norm.sum_dz_xhat[n * C + c] = float(dz_xhat * rstd);
      add_channel(group, affine_of(norm, n, c).a, dz, dz_xhat * rstd);
    }
    divide(group, double(D * norm.P));
    const Values values = values_of(walk, n);
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const Gradient gradient = gradient_of(group, affine_of(norm, n, c).a, scale_of(norm, n, c), mean, rstd);
      values.at(lane_of(c), FROM_DZ) = gradient.from_dz;
      values.at(lane_of(c), FROM_X) = gradient.from_x;
      values.at(lane_of(c), CONSTANT) = gradient.constant;
    }
  }
}

// Partials: of s, s * xhat (without rstd) and s * dz, which make the gradient of scale.
enum { SUM_S, SUM_S_XHAT, SUM_S_DZ };

template <class T, class Activation, bool STREAM, bool DSCALE, bool KEPT>
inline void gradients_of(const GroupNorm& norm, const Walk& walk, int64_t unit, const Segment& segment) {
  const int64_t C = norm.Ch + norm.Cs, size = segment.num_channels;
  const int64_t num_channels = channels_of(norm, walk).last - channels_of(norm, walk).first;
  const Block block = block_of(norm, walk, unit);
  const Values values = values_of(walk, block.n);
  const Partials partials = partials_of(walk, unit);
  const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
  const T* dy = joint_of<const T>(norm, norm.dy, segment, block);
  T* dx = source_of<T>(norm, norm.dh, norm.ds, segment, block);
  const float* kept = dz_of(norm, walk, segment, block);
  each_vector(segment, block.num_rows, [=](int64_t row, auto rows, int64_t c, int64_t vector, auto part) INLINED {
    const Floats scale = values.get(vector, SCALE), mean = values.get(vector, MEAN);
    const Floats a = values.get(vector, A), b = values.get(vector, B);
    const Floats from_dz = values.get(vector, FROM_DZ), from_x = values.get(vector, FROM_X);
    const Floats constant = values.get(vector, CONSTANT);
    Floats sum{}, sum_xhat{}, sum_dz{};
    for (int64_t r = row; r < row + rows.num; ++r) {
      const Floats v = load(x + r * size + c, part), xhat = v * scale - mean;
      Floats dz;
      if constexpr (KEPT) {
        dz = load(kept + r * num_channels + c, part);
      } else {
        prefetch<1>(x + (r + AHEAD) * size + c);
        prefetch<1>(dy + (r + AHEAD) * C + c);
        dz = Activation::times_derivative(load(dy + r * C + c, part), xhat * a + b);
      }
      store<STREAM>(dx + r * size + c, dz * from_dz + (v * from_x + constant), part);
      sum += v;
      sum_xhat += v * xhat;
      sum_dz += v * dz;
    }
    if constexpr (DSCALE) {
      partials.set(vector, SUM_S, partials.get(vector, SUM_S) + sum);
      partials.set(vector, SUM_S_XHAT, partials.get(vector, SUM_S_XHAT) + sum_xhat);
      partials.set(vector, SUM_S_DZ, partials.get(vector, SUM_S_DZ) + sum_dz);
    }
  });
}

template <class T, class Activation, bool KEPT>
inline void gradients_of_blocks(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  for (int64_t unit = end; unit-- > begin;) {
    if (norm.dscale) clear(walk, partials_of(walk, unit));
    each_segment(norm, walk, [&](const Segment& segment) {
      const void* dx = segment.is_skip ? norm.ds : norm.dh;
      const bool streams = norm.streams && rows_are_aligned<T>(dx, segment.num_channels, segment.first);
      const bool has_dscale = norm.dscale && segment.is_skip;
      const auto run = streams      ? has_dscale ? gradients_of<T, Activation, true, true, KEPT>
                                                 : gradients_of<T, Activation, true, false, KEPT>
                       : has_dscale ? gradients_of<T, Activation, false, true, KEPT>
                                    : gradients_of<T, Activation, false, false, KEPT>;
      run(norm, walk, unit, segment);
    });
  }
}

template <class T, class Activation>
void gradients(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const auto run = walk.dz ? gradients_of_blocks<T, Activation, true> : gradients_of_blocks<T, Activation, false>;
  run(norm, walk, begin, end);
}

// A unit is an image.
inline void sum_dscale(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t D = (norm.Ch + norm.Cs) / norm.G;
  const Channels channels = channels_of(norm, walk);
  const Lanes lane_of = lanes_of(norm, walk);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = walk.first_n + unit;
    const Partials partials = partials_of(walk, unit * walk.num_blocks);
    for (int64_t c = channels.first + num_hidden(norm, channels); c < channels.last; ++c) {
      const int64_t g = c / D, lane = lane_of(c);
      const double rstd = norm.rstd[n * norm.G + g];
      norm.dscale[n * norm.Cs + c - norm.Ch] =
          dscale_of(walk.group_sums[unit * walk.num_groups + g - walk.first_g], affine_of(norm, n, c).a, rstd,
                    partials.at(lane, SUM_S), partials.at(lane, SUM_S_XHAT) * rstd, partials.at(lane, SUM_S_DZ));
    }
  }
}

}  // namespace scalelong::SCALELONG_ISA::channels_last
