// A vector of WIDTH floats on the compiler's vector extensions, and what the operators compute with it.
//
// Every file that includes this is compiled once for each instruction set. All names lie in a namespace of that set and
// nothing of the C++ library is used: two sets must not share a function, or the linker would keep either one for both.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__)
#define SCALELONG_ISA avx512_bf16
#define SCALELONG_WIDTH 16
#elif defined(__AVX512F__)
#define SCALELONG_ISA avx512
#define SCALELONG_WIDTH 16
#elif defined(__AVX2__)
#define SCALELONG_ISA avx2
#define SCALELONG_WIDTH 8
#else
#define SCALELONG_ISA baseline
#define SCALELONG_WIDTH 4
#endif

// Where a call, or a closure kept in memory, would cost more than the work.
#define INLINED __attribute__((always_inline))

namespace scalelong::SCALELONG_ISA {

constexpr int WIDTH = SCALELONG_WIDTH;

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats splat(float x) { return x - Floats{}; }

// --- memory ----------------------------------------------------------------------------------------------------------

template <class V>
inline V load_bytes(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Words widened(Halves h) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Words);
#endif
}

// Of values below 2^16.
inline Halves narrowed(Words w) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i packed = _mm256_packus_epi32((__m256i)w, (__m256i)w);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
  return __builtin_convertvector(w, Halves);
#endif
}

inline Floats from_bfloat16(Halves h) { return (Floats)(widened(h) << 16); }

// To the nearest, ties to even. Any NaN becomes one whose upper half is all ones, or with AVX512_BF16 keeps its upper
// bits; rounding one as if it were a number could carry into the sign. AVX512_BF16 takes subnormal numbers (below 1.2e-38)
// for zero.
#if defined(__AVX512BF16__)
inline Halves to_bfloat16(Floats x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }
#else
inline Halves to_bfloat16(Floats x) {
  const Words bits = (Words)x, even = bits >> 16 & 1;
  const Words is_nan = (Words)(x != x);
  return narrowed((bits + 0x7fff + even | is_nan) >> 16);
}
#endif

#if defined(__AVX512F__)
inline Floats from_float16(Halves h) { return (Floats)_mm512_cvtph_ps((__m256i)h); }
inline Halves to_float16(Floats x) {
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
inline Floats from_float16(Halves h) { return (Floats)_mm256_cvtph_ps((__m128i)h); }
inline Halves to_float16(Floats x) { return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
// Multiplying by 2^112 or 2^-112 moves the exponent between the two biases; the hardware does the subnormals.
inline Floats from_float16(Halves h) {
  const Words wide = __builtin_convertvector(h, Words);
  const Floats magnitude = (Floats)((wide & 0x7fff) << 13) * 0x1p112f;
  const Words special = (Words)magnitude | 0x7f800000;  // infinity and NaN
  const Words bits = (wide & 0x7c00) == 0x7c00 ? special : (Words)magnitude;
  return (Floats)(bits | (wide & 0x8000) << 16);
}
inline Halves to_float16(Floats x) {
  const Words sign = (Words)x & 0x80000000u, bits = (Words)x ^ sign;
  // Below the smallest normal, adding 0.5 lines the last bit of a half up with the last bit of the float.
  const Words subnormal = (Words)((Floats)bits + 0.5f) - 0x3f000000u;
  const Words normal = (bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13;
  const Words infinity = Words{} + 0x7c00, nan = Words{} + 0x7e00;
  Words half = bits < 0x38800000u ? subnormal : normal;
  half = bits >= 0x477ff000u ? infinity : half;  // 65520 and above round up to infinity
  half = bits > 0x7f800000u ? nan : half;
  return __builtin_convertvector(half | sign >> 16, Halves);
}
#endif

inline Floats load(const float* p) { return load_bytes<Floats>(p); }
inline Floats load(const BFloat16* p) { return from_bfloat16(load_bytes<Halves>(p)); }
inline Floats load(const Float16* p) { return from_float16(load_bytes<Halves>(p)); }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bfloat16(Halves{} + x.bits)[0]; }
inline float to_float(Float16 x) { return from_float16(Halves{} + x.bits)[0]; }

inline Floats encoded(Floats x, float) { return x; }
inline Halves encoded(Floats x, BFloat16) { return to_bfloat16(x); }
inline Halves encoded(Floats x, Float16) { return to_float16(x); }

// Asks memory for the next ``vectors`` vectors from p on, which need not be there.
template <int vectors, class T>
INLINED inline void prefetch(const T* p) {
  constexpr int64_t LINE = 64;
  constexpr int64_t BYTES = vectors * WIDTH * sizeof(T);
  for (int64_t byte = 0; byte < BYTES; byte += LINE) __builtin_prefetch((const char*)p + byte);
}

template <class V>
inline void stream_bytes(void* p, V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 8) {
    _mm_stream_si64((long long*)p, (long long)v);
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128((__m128i*)p, (__m128i)v);
  }
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#else
  memcpy(p, &v, sizeof v);
#endif
}

// STREAM goes past the caches; p must then be aligned to the vector.
template <bool STREAM, class T>
inline void store(T* p, Floats x) {
  const auto v = encoded(x, T{});
  if constexpr (STREAM) {
    stream_bytes(p, v);
  } else {
    memcpy(p, &v, sizeof v);
  }
}

// The first n of WIDTH elements; the others are 0.
template <class T>
inline Floats load_first(const T* p, int64_t n) {
  if (n == WIDTH) return load(p);  // in a register, where the buffer makes the load wait for stores
  T buffer[WIDTH] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_first(T* p, Floats x, int64_t n) {
  if (n == WIDTH) return store<false>(p, x);
  const auto v = encoded(x, T{});
  memcpy(p, &v, n * sizeof(T));
}

inline Floats first_lanes(int64_t n) {
  Ints index;
  for (int i = 0; i < WIDTH; ++i) index[i] = i;  // a constant
  return index < Ints{} + int32_t(n) ? splat(1.0f) : Floats{};
}

// In double precision, by halves: each addition waits for the one before it. Intrinsics where there are some, because
// compilers make masked moves of shuffles whose lanes they do not see to be constant.
inline double sum_of_lanes(Floats x) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)x;
  const __m512d eight = _mm512_cvtps_pd(_mm512_castps512_ps256(v)) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  const __m256d sum = _mm512_castpd512_pd256(eight) + _mm512_extractf64x4_pd(eight, 1);
#elif defined(__AVX2__)
  const __m256 v = (__m256)x;
  const __m256d sum = _mm256_cvtps_pd(_mm256_castps256_ps128(v)) + _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#endif
#if defined(__AVX2__)
  const __m128d two = _mm256_castpd256_pd128(sum) + _mm256_extractf128_pd(sum, 1);
  return two[0] + two[1];
#else
  return (double(x[0]) + x[2]) + (double(x[1]) + x[3]);
#endif
}

// Orders what was written past the caches before all later writes: the thread that reads it may be told by one of those.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

inline bool is_aligned(const void* p, int64_t bytes) { return (uintptr_t)p % bytes == 0; }

// --- packs -----------------------------------------------------------------------------------------------------------

// NUM vectors that take each operation together. A processor looks at fewer instructions ahead than a few chains of
// exp2 and a division have, so that independent chains run side by side only if their instructions stand side by side.
// Where a shorter pack meets a longer one, it is repeated.
template <int NUM>
struct Pack {
  Floats v[NUM];
};

template <class V>
constexpr int SIZE = 0;
template <int NUM>
constexpr int SIZE<Pack<NUM>> = NUM;

template <class A, class B>
concept OneIsPack = SIZE<A> > 0 || SIZE<B> > 0;

template <int NUM>
INLINED inline Floats at(const Pack<NUM>& x, int k) {
  return x.v[k % NUM];
}
INLINED inline Floats at(Floats x, int) { return x; }
INLINED inline float at(float x, int) { return x; }

// f of each vector of packs; of what is no pack, f of itself.
template <class F, class A, class... B>
INLINED inline auto each(const F& f, const A& a, const B&... b) {
  if constexpr (SIZE<A> > 0) {
    Pack<SIZE<A>> result;
    for (int k = 0; k < SIZE<A>; ++k) result.v[k] = f(at(a, k), at(b, k)...);
    return result;
  } else {
    return f(a, b...);
  }
}

template <class A, class B>
  requires OneIsPack<A, B>
INLINED inline auto operator+(const A& a, const B& b) {
  Pack<(SIZE<A> > SIZE<B> ? SIZE<A> : SIZE<B>)> result;
  for (int k = 0; k < SIZE<decltype(result)>; ++k) result.v[k] = at(a, k) + at(b, k);
  return result;
}
template <class A, class B>
  requires OneIsPack<A, B>
INLINED inline auto operator-(const A& a, const B& b) {
  Pack<(SIZE<A> > SIZE<B> ? SIZE<A> : SIZE<B>)> result;
  for (int k = 0; k < SIZE<decltype(result)>; ++k) result.v[k] = at(a, k) - at(b, k);
  return result;
}
template <class A, class B>
  requires OneIsPack<A, B>
INLINED inline auto operator*(const A& a, const B& b) {
  Pack<(SIZE<A> > SIZE<B> ? SIZE<A> : SIZE<B>)> result;
  for (int k = 0; k < SIZE<decltype(result)>; ++k) result.v[k] = at(a, k) * at(b, k);
  return result;
}

// NUM vectors in a row.
template <int NUM, class T>
INLINED inline Pack<NUM> load_pack(const T* p) {
  Pack<NUM> x;
  for (int k = 0; k < NUM; ++k) x.v[k] = load(p + k * WIDTH);
  return x;
}
template <bool STREAM, class T, int NUM>
INLINED inline void store(T* p, const Pack<NUM>& x) {
  for (int k = 0; k < NUM; ++k) store<STREAM>(p + k * WIDTH, x.v[k]);
}

// Every NUM vectors in one.
template <int NUM, int ALL>
INLINED inline Pack<NUM> sum_by(const Pack<ALL>& x) {
  Pack<NUM> sum{};
  for (int k = 0; k < ALL; ++k) sum.v[k % NUM] = k < NUM ? x.v[k] : sum.v[k % NUM] + x.v[k];
  return sum;
}

// --- functions: of a vector or of a pack -----------------------------------------------------------------------------

// The nearest value of [-limit, limit]; NaN stays NaN, which is why it is the second operand.
inline Floats clamp(Floats x, float limit) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps(_mm512_set1_ps(limit), _mm512_max_ps(_mm512_set1_ps(-limit), (__m512)x));
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps(_mm256_set1_ps(limit), _mm256_max_ps(_mm256_set1_ps(-limit), (__m256)x));
#else
  x = x > limit ? splat(limit) : x;
  return x < -limit ? splat(-limit) : x;
#endif
}

// 2^x within 1.5 units in the last place, or within 1e-4 where ROUGH: a twentieth of the last place of a bfloat16.
#if defined(__AVX512F__)
// Infinity and 0 beyond what a float holds.
template <bool ROUGH = false, class V>
INLINED inline V exp2(V x) {
  constexpr int FLOOR = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const V f = each([](Floats v) INLINED { return (Floats)_mm512_reduce_ps((__m512)v, FLOOR); }, x);
  V p;  // minimax over [0, 1], exact at 0
  if constexpr (ROUGH) {
    p = 0x1.3baaaep-4f * f + 0x1.d23786p-3f;
    p = p * f + 0x1.63e65ap-1f;
  } else {
    p = 0x1.e97502p-10f * f + 0x1.277854p-7f;
    p = p * f + 0x1.c91ce6p-5f;
    p = p * f + 0x1.ebdb56p-3f;
    p = p * f + 0x1.62e4bap-1f;
  }
  p = p * f + 1.0f;
  return each([](Floats p, Floats x) INLINED { return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x); }, p, x);
}

// The same for x <= limit, and beyond that the value there; NaN stays NaN, which is why it is the second operand.
template <bool ROUGH, class V>
INLINED inline V exp2_up_to(V x, float limit) {
  const auto lesser = [=](Floats v) INLINED { return (Floats)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)v); };
  return exp2<ROUGH>(each(lesser, x));
}
#else
// For |x| <= limit <= 126, and beyond that the value there.
template <bool ROUGH, class V>
INLINED inline V exp2_up_to(V x, float limit) {
  x = each([=](Floats v) INLINED { return clamp(v, limit); }, x);
  const float magic = 0x1.8p23f;  // leaves the nearest integer in the low bits
  const V shifted = x + magic;
  const V f = x - (shifted - magic);
  V p;  // minimax over [-1/2, 1/2], exact at 0
  if constexpr (ROUGH) {
    p = 0x1.c2a216p-5f * f + 0x1.f00c4cp-3f;
    p = p * f + 0x1.62f5fap-1f;
  } else {
    p = 0x1.5bba14p-10f * f + 0x1.3cea88p-7f;
    p = p * f + 0x1.c6b752p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
  }
  p = p * f + 1.0f;
  return each([](Floats p, Floats shifted) INLINED { return (Floats)((Ints)p + ((Ints)shifted << 23)); }, p, shifted);
}

template <bool ROUGH = false, class V>
INLINED inline V exp2(V x) {
  return exp2_up_to<ROUGH>(x, 126.0f);
}
#endif

// a / b, within 4e-4 where ROUGH.
template <bool ROUGH>
INLINED inline Floats quotient_of(Floats a, Floats b) {
#if defined(__AVX512F__)
  if constexpr (ROUGH) return a * (Floats)_mm512_rcp14_ps((__m512)b);
#elif defined(__AVX2__)
  if constexpr (ROUGH) return a * (Floats)_mm256_rcp_ps((__m256)b);
#endif
  return a / b;
}
template <bool ROUGH, class V>
INLINED inline V quotient(V a, V b) {
  return each([](Floats a, Floats b) INLINED { return quotient_of<ROUGH>(a, b); }, a, b);
}

constexpr float LOG2_E = 0x1.715476p0f, LN_2 = 0x1.62e43p-1f;

// The distribution function of the normal distribution; Chebyshev fit of erfc from Numerical Recipes, section 6.2.
template <class V>
INLINED inline V normal_cdf(V z) {
  const V magnitude = each([](Floats z) INLINED { return (Floats)((Ints)z & 0x7fffffff); }, z);
  const V x = magnitude * 0x1.6a09e6p-1f;  // |z| / sqrt(2)
  const V t = each([](Floats d) INLINED { return 1.0f / d; }, 1.0f + 0.5f * x);
  V p = 0.17087277f * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const V half_erfc = 0.5f * t * exp2((p - x * x) * LOG2_E);
  return each([](Floats z, Floats half) INLINED { return z > 0.0f ? 1.0f - half : half; }, z, half_erfc);
}

template <class V>
INLINED inline V normal_density(V z) {
  return 0.3989422804f * exp2(z * z * (-0.5f * LOG2_E));
}

// An activation takes z * FACTOR: the kernels fold FACTOR into the affine parameters before it. times_derivative is the
// gradient of z, given that of y.
struct Identity {
  static constexpr float FACTOR = 1.0f;
  template <class V>
  INLINED static V value(V z) {
    return z;
  }
  template <class V>
  INLINED static V times_derivative(V dy, V) {
    return dy;
  }
};

// ROUGH serves bfloat16, whose rounding is larger still.
template <bool ROUGH>
struct Silu {
  static constexpr float FACTOR = -LOG2_E;
  template <class V>
  INLINED static V value(V t) {
    return quotient<ROUGH>(t, -LOG2_E * exp2<ROUGH>(t) - LOG2_E);
  }
  // sigma + z * sigma * (1 - sigma) with sigma = 1 / (1 + e), e = exp(-z): one division, at the end. Within the limit
  // its square is finite, and beyond it the result is 1 or next to 0.
  template <class V>
  INLINED static V times_derivative(V dy, V t) {
    const V e = exp2_up_to<ROUGH>(t, 60.0f), d = 1.0f + e;
    return quotient<ROUGH>(dy * (d + t * -LN_2 * e), d * d);
  }
};

template <class V>
struct ValueAndSlope {
  V value, slope;
};

struct Gelu {
  static constexpr float FACTOR = 1.0f;
  template <class V>
  INLINED static V value(V z) {
    return z * normal_cdf(z);
  }
  template <class V>
  INLINED static V times_derivative(V dy, V z) {
    return dy * (normal_cdf(z) + z * normal_density(z));
  }
  // Both for little more than the price of one.
  template <class V>
  INLINED static ValueAndSlope<V> value_and_slope(V z) {
    const V cdf = normal_cdf(z);
    return {z * cdf, cdf + z * normal_density(z)};
  }
};

// gelu by tanh: z * sigma with sigma = 1 / (1 + e), e = exp(-w), w = 2 sqrt(2 / pi) (z + 0.044715 z^3), because
// 1 + tanh(u) = 2 sigmoid(2 u). The slope is sigma + z * sigma * (1 - sigma) * w', and 1 - sigma is e * sigma.
template <bool ROUGH>
struct GeluTanh {
  static constexpr float FACTOR = 1.0f;
  template <class V>
  INLINED static V value(V z) {
    return quotient<ROUGH>(z, 1.0f + power(within(z)));
  }
  template <class V>
  INLINED static V times_derivative(V dy, V z) {
    return dy * value_and_slope(z).slope;
  }
  template <class V>
  INLINED static ValueAndSlope<V> value_and_slope(V z) {
    const V x = within(z), e = power(x), d = 1.0f + e;
    const V sigma = each([](Floats d) INLINED { return quotient_of<ROUGH>(splat(1.0f), d); }, d);
    const V x_times_slope_of_w = x * (0x1.988454p+0f + 0x1.b6676cp-3f * x * x);
    return {z * sigma, sigma * (1.0f + x_times_slope_of_w * (e * sigma))};
  }

 private:
  // Beyond it sigma is 0 or 1; e is at most 2^126.
  template <class V>
  INLINED static V within(V z) {
    return each([](Floats v) INLINED { return clamp(v, 10.0f); }, z);
  }
  template <class V>
  INLINED static V power(V x) {
    return exp2<ROUGH>(x * (-0x1.26aec2p+1f - 0x1.a5a7dp-4f * x * x));
  }
};

}  // namespace scalelong::SCALELONG_ISA
