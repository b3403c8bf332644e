// Compiled once for each instruction set.

#include "layer_norm.h"
#include "vector.h"

namespace scalelong::SCALELONG_ISA {

namespace {

constexpr int TOGETHER = 4;        // vectors of a row in forward
constexpr int64_t COLUMNS = 64;    // of the sums that are put together at a time

// --- memory ----------------------------------------------------------------------------------------------------------

// A sum of two 16-bit numbers often lies halfway between two others: rounding it away from zero would make the stream
// grow from block to block. A NaN stays one.
inline Words nearest_bfloat16(Floats x) {
  const Words bits = (Words)x, nan = Words{} + 0x7fc00000;
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : nan;
}

// What is stored as a T, read again.
inline Floats rounded(Floats x, float) { return x; }
inline Floats rounded(Floats x, BFloat16) { return (Floats)(nearest_bfloat16(x) & 0xffff0000u); }
inline Floats rounded(Floats x, Float16) { return from_float16(to_float16(x)); }

inline Floats exact_encoded(Floats x, float) { return x; }
inline Halves exact_encoded(Floats x, BFloat16) { return narrowed(nearest_bfloat16(x) >> 16); }
inline Halves exact_encoded(Floats x, Float16) { return to_float16(x); }

// Elements [d, d + size) of a row, size at most WIDTH.
template <class T>
INLINED inline Floats get(const T* row, int64_t d, int64_t size) {
  return size == WIDTH ? load(row + d) : load_first(row + d, size);
}
template <bool STREAM = false, class T>
INLINED inline void put(T* row, int64_t d, int64_t size, Floats x) {
  const auto v = exact_encoded(x, T{});
  if (size == WIDTH) {
    if constexpr (STREAM) {
      stream_bytes(row + d, v);
    } else {
      memcpy(row + d, &v, sizeof v);
    }
  } else {
    memcpy(row + d, &v, size * sizeof(T));
  }
}

// Calls f(d, size) for the vectors of a row; size is a constant but for the last.
template <class F>
INLINED inline void each_vector(int64_t D, const F& f) {
  int64_t d = 0;
  for (; d + WIDTH <= D; d += WIDTH) f(d, int64_t(WIDTH));
  if (d < D) f(d, D - d);
}

// The same for f(k, d, size), with k counting the vectors around: chains of additions side by side.
template <class F>
INLINED inline void each_vector_in_turn(int64_t D, const F& f) {
  int64_t d = 0;
  for (; d + TOGETHER * WIDTH <= D; d += TOGETHER * WIDTH) {
    for (int k = 0; k < TOGETHER; ++k) f(k, d + k * WIDTH, int64_t(WIDTH));
  }
  for (int k = 0; d < D; d += WIDTH, ++k) f(k, d, D - d < WIDTH ? D - d : int64_t(WIDTH));
}

// Whether all rows of a tensor may be written past the caches: whole vectors, each aligned.
template <class T>
inline bool can_stream(const T* rows, int64_t D) {
  return D % WIDTH == 0 && is_aligned(rows, WIDTH * sizeof(T));
}

// So that other threads see what was written past the caches.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

inline double sum_of_all(const Floats (&sums)[TOGETHER]) {
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// --- coefficients ----------------------------------------------------------------------------------------------------

struct Rows {
  int64_t b, first, last;
};

inline Rows rows_of(const AddLayerNorm& norm, int64_t unit) {
  const int64_t b = unit / norm.num_blocks, t = unit % norm.num_blocks * norm.rows_per_block;
  const int64_t end = t + norm.rows_per_block < norm.T ? t + norm.rows_per_block : norm.T;
  return {b, b * norm.T + t, b * norm.T + end};
}

inline void fill_coefficients(const AddLayerNorm& norm, int64_t b, float* a, float* c) {
  const float *gain = norm.gain ? norm.gain + b * norm.D : nullptr, *shift = norm.shift ? norm.shift + b * norm.D : nullptr;
  for (int64_t d = 0; d < norm.D; ++d) {
    const float factor = gain ? 1.0f + gain[d] : 1.0f;
    a[d] = norm.weight ? norm.weight[d] * factor : factor;
    c[d] = (norm.bias ? norm.bias[d] * factor : 0.0f) + (shift ? shift[d] : 0.0f);
  }
}

// What turns the pairs (i, i + D / 2) of a sample's rows; null where nothing does.
struct Turns {
  const float *cosine, *sine;
};

inline Turns turns_of(const AddLayerNorm& norm, int64_t b) {
  return norm.cosine ? Turns{norm.cosine + b * (norm.D / 2), norm.sine + b * (norm.D / 2)} : Turns{};
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Fills ``kept``, if it is given, with the stream in fp32, and the stream itself if there is a branch. Returns the sum over the row.
template <bool STREAM, class X, class Branch>
INLINED inline double add(const X* x, const Branch* branch, const float* gate, X* stream, float* kept, int64_t D) {
  Floats sums[TOGETHER] = {};
  each_vector_in_turn(D, [&](int k, int64_t d, int64_t size) INLINED {
    Floats s = get(x, d, size);
    if (branch) {
      const Floats added = get(branch, d, size);
      s = rounded(gate ? s + get(gate, d, size) * added : s + added, X{});
      put<STREAM>(stream, d, size, s);
    }
    if (kept) put(kept, d, size, s);
    sums[k] += s;
  });
  return sum_of_all(sums);
}

// The stream in fp32 where it is found in the first cache as it was written; null elsewhere.
template <bool STREAM>
inline const float* in_cache(const float* stream) {
  return STREAM ? nullptr : stream;
}
template <bool STREAM, class X>
inline const float* in_cache(const X*) {
  return nullptr;
}

struct Moments {
  double mean, variance;
};

// In two sweeps, the second around the mean that the first one found.
INLINED inline Moments moments_of(const float* row, double sum, int64_t D) {
  const float near = float(sum / double(D));
  Floats distances[TOGETHER] = {}, squares[TOGETHER] = {};
  each_vector_in_turn(D, [&](int k, int64_t d, int64_t size) INLINED {
    Floats distance = get(row, d, size) - near;
    if (size < WIDTH) distance *= first_lanes(size);
    distances[k] += distance;
    squares[k] += distance * distance;
  });
  const double left = sum_of_all(distances) / double(D);
  return {near + left, sum_of_all(squares) / double(D) - left * left};
}

// Writes y of a row, turned where there are angles, given xhat(d, size).
template <bool STREAM, class Y, class F>
INLINED inline void write_y(const F& xhat, const float* a, const float* c, Turns turns, Y* y, int64_t D) {
  const auto z = [&](int64_t d, int64_t size) INLINED { return xhat(d, size) * get(a, d, size) + get(c, d, size); };
  if (!turns.cosine) return each_vector(D, [&](int64_t d, int64_t size) INLINED { put<STREAM>(y, d, size, z(d, size)); });
  const int64_t half = D / 2;
  each_vector(half, [&](int64_t d, int64_t size) INLINED {
    const Floats first = z(d, size), second = z(half + d, size);
    const Floats cosine = get(turns.cosine, d, size), sine = get(turns.sine, d, size);
    put<STREAM>(y, d, size, first * cosine - second * sine);
    put<STREAM>(y, half + d, size, second * cosine + first * sine);
  });
}

template <class X, class Branch, class Y, bool STREAM>
void forward_rows(const AddLayerNorm& norm, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = norm.D;
  float *a = scratch, *c = scratch + D;
  for (int64_t unit = begin, b = -1; unit < end; ++unit) {
    const Rows rows = rows_of(norm, unit);
    if (b != rows.b) fill_coefficients(norm, b = rows.b, a, c);
    const float* gate = norm.gate ? norm.gate + b * D : nullptr;
    const Turns turns = turns_of(norm, b);
    for (int64_t row = rows.first; row < rows.last; ++row) {
      const X* x = (const X*)norm.x + row * D;
      const Branch* branch = norm.branch ? (const Branch*)norm.branch + row * D : nullptr;
      X* stream = branch ? (X*)norm.stream + row * D : nullptr;
      const float* found = in_cache<STREAM>(branch ? stream : x);
      const float* kept = found ? found : scratch + 2 * D;
      const double sum = add<STREAM>(x, branch, gate, stream, found ? nullptr : scratch + 2 * D, D);
      const Moments moments = moments_of(kept, sum, D);
      const double rstd = 1.0 / __builtin_sqrt(moments.variance + norm.eps);
      const float mean = float(moments.mean), factor = float(rstd);
      norm.mean[row] = mean;
      norm.rstd[row] = factor;
      // What the mean loses by rounding goes into a constant, where it costs nothing.
      const float constant = float((mean - moments.mean) * rstd);
      const auto xhat = [&](int64_t d, int64_t size) INLINED {
        if constexpr (STREAM) {  // the next row comes from memory, while this one is in the first cache
          prefetch<1>(x + D + d);
          if (branch) prefetch<1>(branch + D + d);
        }
        return (get(kept, d, size) - mean) * factor + constant;
      };
      write_y<STREAM>(xhat, a, c, turns, (Y*)norm.y + row * D, D);
    }
  }
  if constexpr (STREAM) finish_streams();
}

template <class X, class Branch, class Y>
void forward(const AddLayerNorm& norm, int64_t begin, int64_t end, float* scratch) {
  const int64_t together = norm.cosine ? norm.D / 2 : norm.D;  // of y, each half of which is a row by itself
  const bool streams = norm.streams && can_stream((const X*)norm.stream, norm.D) && can_stream((const Y*)norm.y, together);
  (streams ? forward_rows<X, Branch, Y, true> : forward_rows<X, Branch, Y, false>)(norm, begin, end, scratch);
}

// --- backward --------------------------------------------------------------------------------------------------------

// Means over a row of dz and dz * xhat, where dz = dy * a.
struct Means {
  float dz, dz_xhat;
};

// Fills ``dz`` with NUM rows of dy turned back. The angles' gradients sum up dz2 z1 - dz1 z2 with z = xhat * a + c: what
// dy has at right angles to y, which turning both does not change.
template <bool STREAM, int NUM, class X, class Y>
INLINED inline void turn_back(const AddLayerNorm& norm, int64_t row, const float* a, const float* c, Turns turns,
                              float* dangle_sums, float* dz) {
  const int64_t D = norm.D, half = D / 2;
  const X* stream = (const X*)norm.x + row * D;
  const Y* dy = (const Y*)norm.dy + row * D;
  const float *mean = norm.mean + row, *rstd = norm.rstd + row;
  each_vector(half, [&](int64_t d, int64_t size) INLINED {
    const Floats cosine = get(turns.cosine, d, size), sine = get(turns.sine, d, size);
    Floats dangle = dangle_sums ? get(dangle_sums, d, size) : Floats{};
    for (int r = 0; r < NUM; ++r) {
      if constexpr (STREAM) {
        prefetch<1>(dy + (NUM + r) * D + d);
        prefetch<1>(dy + (NUM + r) * D + half + d);
      }
      const Floats first = get(dy + r * D, d, size), second = get(dy + r * D, half + d, size);
      const Floats dz1 = first * cosine + second * sine, dz2 = second * cosine - first * sine;
      put(dz + r * D, d, size, dz1);
      put(dz + r * D, half + d, size, dz2);
      if (dangle_sums) {
        const Floats xhat1 = (get(stream + r * D, d, size) - mean[r]) * rstd[r];
        const Floats xhat2 = (get(stream + r * D, half + d, size) - mean[r]) * rstd[r];
        dangle += dz2 * (xhat1 * get(a, d, size) + get(c, d, size));
        dangle -= dz1 * (xhat2 * get(a, half + d, size) + get(c, half + d, size));
      }
    }
    if (dangle_sums) put(dangle_sums, d, size, dangle);
  });
}

template <bool STREAM, int NUM, class X, class Y>
INLINED inline void sum_rows(const AddLayerNorm& norm, int64_t row, const Y* dy, const float* a, float* sums,
                             Means* means) {
  const int64_t D = norm.D;
  const X* stream = (const X*)norm.x + row * D;
  const X* dstream = norm.dstream ? (const X*)norm.dstream + row * D : nullptr;
  const float *mean = norm.mean + row, *rstd = norm.rstd + row;
  Floats dz_sums[NUM] = {}, dz_xhat_sums[NUM] = {};
  each_vector(D, [&](int64_t d, int64_t size) INLINED {
    const Floats factor = get(a, d, size);
    Floats dy_sum = sums ? get(sums, d, size) : Floats{}, dy_xhat_sum = sums ? get(sums + D, d, size) : Floats{};
    for (int r = 0; r < NUM; ++r) {
      if (STREAM && dstream) prefetch<1>(dstream + r * D + d);
      const Floats g = get(dy + r * D, d, size), xhat = (get(stream + r * D, d, size) - mean[r]) * rstd[r];
      const Floats g_xhat = g * xhat;
      dz_sums[r] += g * factor;
      dz_xhat_sums[r] += g_xhat * factor;
      dy_sum += g;
      dy_xhat_sum += g_xhat;
    }
    if (sums) {
      put(sums, d, size, dy_sum);
      put(sums + D, d, size, dy_xhat_sum);
    }
  });
  for (int r = 0; r < NUM; ++r) {
    means[r] = {float(sum_of_lanes(dz_sums[r]) / double(D)), float(sum_of_lanes(dz_xhat_sums[r]) / double(D))};
  }
}

template <bool STREAM, int AHEAD, class X, class Branch, class Y>
INLINED inline void write_row(const AddLayerNorm& norm, int64_t row, const Y* dy, const float* a, const float* gate,
                      float* dgate_sums, Means means) {
  const int64_t D = norm.D, at = row * D;
  const X *stream = (const X*)norm.x + at, *dstream = norm.dstream ? (const X*)norm.dstream + at : nullptr;
  const Branch* branch = dgate_sums ? (const Branch*)norm.branch + at : nullptr;
  X* dx = norm.dx ? (X*)norm.dx + at : nullptr;
  Branch* dbranch = norm.dbranch ? (Branch*)norm.dbranch + at : nullptr;
  const float mean = norm.mean[row], rstd = norm.rstd[row];
  each_vector(D, [&](int64_t d, int64_t size) INLINED {
    if constexpr (STREAM) {
      prefetch<1>(stream + AHEAD * D + d);
      prefetch<1>(dy + AHEAD * D + d);
    }
    const Floats xhat = (get(stream, d, size) - mean) * rstd;
    // One expression, contracted alike whatever else is wanted, so that no bit depends on that.
    const Floats added = dstream ? get(dstream, d, size) : Floats{};
    const Floats gradient = (get(dy, d, size) * get(a, d, size) - means.dz - xhat * means.dz_xhat) * rstd + added;
    if (dx) put<STREAM>(dx, d, size, gradient);
    if (dbranch) put<STREAM>(dbranch, d, size, gate ? gradient * get(gate, d, size) : gradient);
    if (dgate_sums) put(dgate_sums, d, size, get(dgate_sums, d, size) + gradient * get(branch, d, size));
  });
}

template <class X, class Branch, class Y, bool STREAM>
void backward_rows(const AddLayerNorm& norm, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = norm.D;
  float *a = scratch, *c = scratch + D, *dz = scratch + 2 * D;
  const int64_t num_sums = norm.dangle ? NUM_SUMS : NUM_SUMS - 1;
  const bool sums_parameters = norm.dweight || norm.dbias || norm.dgain || norm.dshift;
  const bool writes = norm.dx || norm.dbranch || norm.dgate;
  for (int64_t unit = begin, b = -1; unit < end; ++unit) {
    const Rows rows = rows_of(norm, unit);
    if (b != rows.b) fill_coefficients(norm, b = rows.b, a, c);
    const float* gate = norm.gate ? norm.gate + b * D : nullptr;
    const Turns turns = turns_of(norm, b);
    float* sums = norm.sums ? norm.sums + unit * NUM_SUMS * D : nullptr;
    if (sums) memset(sums, 0, num_sums * D * sizeof(float));
    float *dy_sums = sums_parameters ? sums : nullptr, *dgate_sums = norm.dgate ? sums + 2 * D : nullptr;
    float* dangle_sums = norm.dangle ? sums + 3 * D : nullptr;
    int64_t row = rows.first;
    const auto finish = [&]<int NUM, class T>(const T* dy) INLINED {
      Means means[NUM];
      sum_rows<STREAM, NUM, X>(norm, row, dy, a, dy_sums, means);
      for (int r = 0; writes && r < NUM; ++r) {
        write_row<STREAM, NUM, X, Branch>(norm, row + r, dy + r * D, a, gate, dgate_sums, means[r]);
      }
      row += NUM;
    };
    const auto run = [&]<int NUM>() INLINED {
      if (!turns.cosine) return finish.template operator()<NUM>((const Y*)norm.dy + row * D);
      turn_back<STREAM, NUM, X, Y>(norm, row, a, c, turns, dangle_sums, dz);
      finish.template operator()<NUM>((const float*)dz);
    };
    while (row + ROWS_TOGETHER <= rows.last) run.template operator()<ROWS_TOGETHER>();
    while (row < rows.last) run.template operator()<1>();
  }
  if constexpr (STREAM) finish_streams();
}

template <class X, class Branch, class Y>
void backward(const AddLayerNorm& norm, int64_t begin, int64_t end, float* scratch) {
  const bool streams =
      norm.streams && can_stream((const X*)norm.dx, norm.D) && can_stream((const Branch*)norm.dbranch, norm.D);
  (streams ? backward_rows<X, Branch, Y, true> : backward_rows<X, Branch, Y, false>)(norm, begin, end, scratch);
}

void parameters(const AddLayerNorm& norm, int64_t begin, int64_t end) {
  const int64_t D = norm.D;
  for (int64_t first = begin; first < end; first += COLUMNS) {
    const int64_t size = end - first < COLUMNS ? end - first : COLUMNS;
    double dweight[COLUMNS] = {}, dbias[COLUMNS] = {};
    for (int64_t b = 0; b < norm.B; ++b) {
      double sums[NUM_SUMS][COLUMNS] = {};
      const int64_t num_sums = norm.dangle ? NUM_SUMS : NUM_SUMS - 1;
      for (int64_t block = 0; block < norm.num_blocks; ++block) {
        const float* of_block = norm.sums + (b * norm.num_blocks + block) * NUM_SUMS * D + first;
        for (int64_t k = 0; k < num_sums; ++k) {
          for (int64_t i = 0; i < size; ++i) sums[k][i] += of_block[k * D + i];
        }
      }
      const auto &dy = sums[0], &dy_xhat = sums[1];
      const int64_t half = D / 2;
      for (int64_t i = 0; norm.dangle && i < size && first + i < half; ++i) {
        norm.dangle[b * half + first + i] = float(sums[3][i]);
      }
      for (int64_t i = 0; i < size; ++i) {
        const int64_t d = first + i, at = b * D + d;
        const double factor = norm.gain ? 1.0 + norm.gain[at] : 1.0;
        dweight[i] += factor * dy_xhat[i];
        dbias[i] += factor * dy[i];
        if (norm.dgain) {
          norm.dgain[at] = float((norm.weight ? norm.weight[d] : 1.0) * dy_xhat[i] + (norm.bias ? norm.bias[d] : 0.0) * dy[i]);
        }
        if (norm.dshift) norm.dshift[at] = float(dy[i]);
        if (norm.dgate) norm.dgate[at] = float(sums[2][i]);
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      if (norm.dweight) norm.dweight[first + i] = float(dweight[i]);
      if (norm.dbias) norm.dbias[first + i] = float(dbias[i]);
    }
  }
}

template <class X, class Branch, class Y>
AddLayerNormKernels kernels() {
  return {forward<X, Branch, Y>, backward<X, Branch, Y>, parameters};
}

// An fp32 stream, with 16-bit branches and outputs as under autocast.
template <class Half>
AddLayerNormKernels find_beside(Type half, Type branch, Type y) {
  if (branch == half) return y == half ? kernels<float, Half, Half>() : kernels<float, Half, float>();
  return kernels<float, float, Half>();
}

}  // namespace

// Null where there is none: 16-bit streams come with branches and outputs of their own type, and of two 16-bit types
// there is one.
AddLayerNormKernels find_add_layer_norm(Type stream, Type branch, Type y) {
  if (stream == branch && stream == y) {
    if (stream == Type::bfloat16) return kernels<BFloat16, BFloat16, BFloat16>();
    return stream == Type::float16 ? kernels<Float16, Float16, Float16>() : kernels<float, float, float>();
  }
  const Type half = branch == Type::float32 ? y : branch;
  const bool fits = stream == Type::float32 && (branch == half || branch == stream) && (y == half || y == stream);
  if (!fits) return {};
  return half == Type::bfloat16 ? find_beside<BFloat16>(half, branch, y) : find_beside<Float16>(half, branch, y);
}

}  // namespace scalelong::SCALELONG_ISA
