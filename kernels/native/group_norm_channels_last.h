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
// How many rows and vectors of elements are taken together: several rows, so that what is known of a channel is loaded
// once for them.
struct Tall {
  static constexpr int ROWS = 4, VECTORS = 1;
};
// Writes past the caches gather in few buffers, which rows at the same place of a page take from each other.
struct Wide {
  static constexpr int ROWS = 1, VECTORS = 4;
};
// How many rows ahead memory is asked for a strip.
constexpr int64_t AHEAD = 4;

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

  // Those of a tile's vectors.
  template <class Tile>
  INLINED auto get(const Tile& tile, int which) const {
    Pack<Tile::num_vectors> x;
    for (int v = 0; v < Tile::num_vectors; ++v) x.v[v] = get(tile.vector + v, which);
    return x;
  }
  template <class Tile>
  INLINED void set(const Tile& tile, int which, const Pack<Tile::num_vectors>& x) const {
    for (int v = 0; v < Tile::num_vectors; ++v) set(tile.vector + v, which, x.v[v]);
  }
  // Adds what is in all rows of a tile.
  template <class Tile, int NUM>
  INLINED void add(const Tile& tile, int which, const Pack<NUM>& x) const {
    set(tile, which, get(tile, which) + sum_by<Tile::num_vectors>(x));
  }

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

// ROWS rows from ``row`` on, and in them VECTORS vectors of channels from ``c`` on; the first is ``vector`` in the records.
template <int ROWS, int VECTORS, class Part>
struct Tile {
  static constexpr int num_rows = ROWS, num_vectors = VECTORS;
  int64_t row, c, vector;
  Part part;

  template <class T>
  INLINED Pack<ROWS * VECTORS> load(const T* p, int64_t row_stride) const {
    Pack<ROWS * VECTORS> x;
    each([&](int k, int64_t offset) INLINED { x.v[k] = channels_last::load(p + offset, part); }, row_stride);
    return x;
  }

  template <bool STREAM, class T>
  INLINED void store(T* p, int64_t row_stride, const Pack<ROWS * VECTORS>& x) const {
    each([&](int k, int64_t offset) INLINED { channels_last::store<STREAM>(p + offset, x.v[k], part); }, row_stride);
  }

  // Asks memory for the tile that comes AHEAD.
  template <class T>
  INLINED void prefetch(const T* p, int64_t row_stride) const {
    for (int k = 0; k < ROWS; ++k) SCALELONG_ISA::prefetch<VECTORS>(p + (row + k + AHEAD) * row_stride + c);
  }

 private:
  template <class F>
  INLINED void each(const F& f, int64_t row_stride) const {
    for (int k = 0; k < ROWS; ++k) {
      for (int v = 0; v < VECTORS; ++v) f(k * VECTORS + v, (row + k) * row_stride + c + v * WIDTH);
    }
  }
};

// Calls f(tile) for the tiles of a segment's channels in each row.
template <class Shape = Tall, class F>
INLINED inline void each_tile(const Segment& segment, int64_t num_rows, const F& f) {
  for (int64_t first_row = 0; first_row < num_rows; first_row += ROWS) {
    const int64_t last_row = first_row + ROWS < num_rows ? first_row + ROWS : num_rows;
    for (int64_t strip = 0; strip < segment.size; strip += STRIP) {
      const int64_t last = strip + STRIP < segment.size ? strip + STRIP : segment.size;
      const int64_t vector = segment.first_vector + strip / WIDTH;
      // Calls f for the whole tiles of a row, or of some, and goes on after them.
      const auto whole_tiles = [&]<int NUM_ROWS, int NUM>(Tile<NUM_ROWS, NUM, Whole>& tile) INLINED {
        for (; tile.c + NUM * WIDTH <= last; tile.c += NUM * WIDTH, tile.vector += NUM) f(tile);
      };
      const auto rest_of_row = [&](Tile<1, 1, Whole> tile) INLINED {
        whole_tiles(tile);
        if (tile.c < last) f(Tile<1, 1, First>{tile.row, tile.c, tile.vector, {last - tile.c}});
      };
      int64_t row = first_row;
      for (; row + Shape::ROWS <= last_row; row += Shape::ROWS) {
        Tile<Shape::ROWS, Shape::VECTORS, Whole> tile{row, strip, vector, {}};
        whole_tiles(tile);
        if (tile.c < last) {
          for (int k = 0; k < Shape::ROWS; ++k) rest_of_row({row + k, tile.c, tile.vector, {}});
        }
      }
      for (; row < last_row; ++row) rest_of_row({row, strip, vector, {}});
    }
  }
}

// Partials of a channel before scaling: its mean is ORIGIN + DISTANCE, and SQUARES the sum of squared distances from it.
enum { ORIGIN, DISTANCE, SQUARES };

inline Floats median(Floats a, Floats b, Floats c) {
  const Floats lesser = a < b ? a : b, greater = a < b ? b : a;
  const Floats least_of_greater = greater < c ? greater : c;
  return lesser > least_of_greater ? lesser : least_of_greater;
}

// Distances from there lose no digits to a mean that is far from zero, nor to an outlier: of three rows the median. The
// other partials become 0.
template <class T>
inline void set_origins(const Partials& partials, const Segment& segment, const T* x, int64_t num_rows) {
  const T* const rows[] = {x, x + num_rows / 2 * segment.num_channels, x + (num_rows - 1) * segment.num_channels};
  for (int64_t c = 0; c < segment.size; c += WIDTH) {
    const int64_t vector = segment.first_vector + c / WIDTH, left = segment.size - c < WIDTH ? segment.size - c : WIDTH;
    Floats values[3];
    for (int k = 0; k < 3; ++k) values[k] = load_first(rows[k] + c, left);
    partials.set(vector, ORIGIN, median(values[0], values[1], values[2]));
    partials.set(vector, DISTANCE, Floats{});
    partials.set(vector, SQUARES, Floats{});
  }
}

template <class T>
void moments(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(norm, walk, unit);
    const Partials partials = partials_of(walk, unit);
    each_segment(norm, walk, [&](const Segment& segment) {
      const int64_t size = segment.num_channels;
      const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
      set_origins(partials, segment, x, block.num_rows);
      each_tile(segment, block.num_rows, [=](auto tile) INLINED {
        tile.prefetch(x, size);
        const auto distance = tile.load(x, size) - partials.get(tile, ORIGIN);
        partials.add(tile, DISTANCE, distance);
        partials.add(tile, SQUARES, distance * distance);
      });
      for (int64_t vector = segment.first_vector; vector < segment.first_vector + vectors_of(segment.size); ++vector) {
        const Floats sum = partials.get(vector, DISTANCE), distance = sum / float(block.num_rows);
        partials.set(vector, DISTANCE, distance);
        partials.set(vector, SQUARES, partials.get(vector, SQUARES) - sum * distance);
      }
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

template <class T, class Activation, bool STREAM, class Shape>
inline void activate(const GroupNorm& norm, const Walk& walk, int64_t unit) {
  const Block block = block_of(norm, walk, unit);
  const Values values = values_of(walk, block.n);
  const int64_t C = norm.Ch + norm.Cs;
  each_segment(norm, walk, [&](const Segment& segment) {
    const int64_t size = segment.num_channels;
    const T* x = source_of<const T>(norm, norm.h, norm.s, segment, block);
    T* y = joint_of<T>(norm, norm.y, segment, block);
    each_tile<Shape>(segment, block.num_rows, [=](auto tile) INLINED {
      const auto scale = values.get(tile, SCALE), mean = values.get(tile, MEAN);
      const auto a = values.get(tile, A), b = values.get(tile, B);
      tile.prefetch(x, size);
      const auto xhat = tile.load(x, size) * scale - mean;
      tile.template store<STREAM>(y, C, Activation::value(xhat * a + b));
    });
  });
}

// Whether in all rows of a tensor the element of channel c lies on the boundary of a vector.
template <class T>
inline bool rows_are_aligned(const void* p, int64_t num_channels, int64_t c) {
  return is_aligned(p, WIDTH * sizeof(T)) && num_channels % WIDTH == 0 && c % WIDTH == 0;
}

// Whether rows of so many channels lie at the same place of a page, or every second one.
template <class T>
inline bool rows_share_places(int64_t num_channels) {
  return num_channels * sizeof(T) % 2048 == 0;
}

template <class T, class Activation>
void activate_blocks(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  const Channels channels = channels_of(norm, walk);
  const int64_t C = norm.Ch + norm.Cs;
  const bool streams = norm.streams && rows_are_aligned<T>(norm.y, C, channels.first) &&
                       (channels.first + num_hidden(norm, channels)) % WIDTH == 0;
  const auto run = !streams                  ? activate<T, Activation, false, Tall>
                   : rows_share_places<T>(C) ? activate<T, Activation, true, Wide>
                                             : activate<T, Activation, true, Tall>;
  // Backwards: the rows that were read last are still in the cache.
  for (int64_t unit = end; unit-- > begin;) run(norm, walk, unit);
  if (streams) finish_streams();
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
      each_tile(segment, block.num_rows, [=](auto tile) INLINED {
        const auto scale = values.get(tile, SCALE), mean = values.get(tile, MEAN);
        const auto a = values.get(tile, A), b = values.get(tile, B);
        tile.prefetch(x, size);
        tile.prefetch(dy, C);
        const auto xhat = tile.load(x, size) * scale - mean;
        const auto dz = Activation::times_derivative(tile.load(dy, C), xhat * a + b);
        if (kept) tile.template store<false>(kept, num_channels, dz);
        partials.add(tile, SUM_DZ, dz);
        partials.add(tile, SUM_DZ_XHAT, dz * xhat);
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

template <class T, class Activation, bool STREAM, class Shape, bool DSCALE, bool KEPT>
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
  each_tile<Shape>(segment, block.num_rows, [=](auto tile) INLINED {
    const auto scale = values.get(tile, SCALE), mean = values.get(tile, MEAN);
    const auto a = values.get(tile, A), b = values.get(tile, B);
    const auto from_dz = values.get(tile, FROM_DZ), from_x = values.get(tile, FROM_X);
    const auto constant = values.get(tile, CONSTANT);
    const auto v = tile.load(x, size), xhat = v * scale - mean;
    auto dz = v;
    if constexpr (KEPT) {
      dz = tile.load(kept, num_channels);
    } else {
      tile.prefetch(x, size);
      tile.prefetch(dy, C);
      dz = Activation::times_derivative(tile.load(dy, C), xhat * a + b);
    }
    tile.template store<STREAM>(dx, size, dz * from_dz + (v * from_x + constant));
    if constexpr (DSCALE) {
      partials.add(tile, SUM_S, v);
      partials.add(tile, SUM_S_XHAT, v * xhat);
      partials.add(tile, SUM_S_DZ, v * dz);
    }
  });
}

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

template <class T, class Activation, bool KEPT>
inline void gradients_of_blocks(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  for (int64_t unit = end; unit-- > begin;) {
    if (norm.dscale) clear(walk, partials_of(walk, unit));
    each_segment(norm, walk, [&](const Segment& segment) {
      const void* dx = segment.is_skip ? norm.ds : norm.dh;
      if (dx == nullptr) return;
      const bool streams = norm.streams && rows_are_aligned<T>(dx, segment.num_channels, segment.first);
      const auto choose = [=](auto has_dscale) {
        constexpr bool DSCALE = decltype(has_dscale)::value;
        return !streams                                    ? gradients_of<T, Activation, false, Tall, DSCALE, KEPT>
               : rows_share_places<T>(segment.num_channels) ? gradients_of<T, Activation, true, Wide, DSCALE, KEPT>
                                                           : gradients_of<T, Activation, true, Tall, DSCALE, KEPT>;
      };
      const auto run = norm.dscale && segment.is_skip ? choose(Flag<true>{}) : choose(Flag<false>{});
      run(norm, walk, unit, segment);
    });
  }
  if (norm.streams) finish_streams();
}

template <class T, class Activation>
void gradients(const GroupNorm& norm, const Walk& walk, int64_t begin, int64_t end) {
  // Where dz was kept, nothing depends on the activation.
  const auto run = walk.dz ? gradients_of_blocks<T, Identity, true> : gradients_of_blocks<T, Activation, false>;
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
