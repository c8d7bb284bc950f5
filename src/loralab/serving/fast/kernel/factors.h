// What products multiply. Weights are stored as fp32, bf16 or int8; where no instruction multiplies
// what is stored, they are widened on the way: bf16 to fp32, int8 to int16.
#pragma once

#include <type_traits>

#include "lanes.h"

namespace loralab {

typedef int16_t Shorts __attribute__((vector_size(BYTES)));
typedef int8_t HalfShorts __attribute__((vector_size(BYTES / 2)));

template <class W>
struct FactorOf {
  using Type = W;
};
#if !defined(__AVX512BF16__)
template <>
struct FactorOf<bf16> {
  using Type = float;
};
#endif
template <>
struct FactorOf<int8_t> {
  using Type = int16_t;
};

// The type in which weights W are multiplied, and which their inputs have.
template <class W>
using Factor = typename FactorOf<W>::Type;

// A register of factors. A product of two adds, in each lane, PER_LANE products of numbers.
// MOST_ROWS: of one inner product: so many times four sums, and what they are made of, fill the
// registers.
template <class F>
struct Pack;

template <>
struct Pack<float> {
  using Type = Floats;
  using Sum = Floats;
  static constexpr int PER_LANE = 1, MOST_ROWS = LANES == 16 ? 6 : 3;
  static Sum dot(Sum sum, Type a, Type b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Pack<bf16> {
  using Type = Bits;
  using Sum = Floats;
  static constexpr int PER_LANE = 2, MOST_ROWS = 6;
  static Sum dot(Sum sum, Type a, Type b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <>
struct Pack<int16_t> {
  using Type = Shorts;
  using Sum = Ints;
  static constexpr int PER_LANE = 2, MOST_ROWS = LANES == 16 ? 6 : 2;
  static Sum dot(Sum sum, Type a, Type b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const Ints low = ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16);
    return sum + low + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
  }
};

template <class W>
constexpr int PACK = LANES * Pack<Factor<W>>::PER_LANE;  // numbers

// Reads a register of factors.
template <class W>
inline typename Pack<Factor<W>>::Type load_factors(const W* from) {
  if constexpr (std::is_same_v<W, Factor<W>>) {
    return load_as<typename Pack<W>::Type>(from);
  } else if constexpr (std::is_same_v<W, int8_t>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Shorts)_mm256_cvtepi8_epi16(load_as<__m128i>(from));
#else
    return __builtin_convertvector(load_as<HalfShorts>(from), Shorts);
#endif
  } else {
    return load_floats(from);
  }
}

inline Floats as_floats(Floats x) { return x; }
inline Floats as_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// A row of `size` numbers as whole ones: x[k] * columns[k] = to[k] * (what it gives). They are as
// large as sums of products with int8 allow for; where a number is none, it gives none.
template <class F>
inline float as_whole(const F* x, const float* columns, int64_t size, int16_t* to) {
  Floats most = {}, none = {};
  for (int64_t k = 0; k < size; k += LANES) {
    const Floats v = load_floats(x + k) * load_floats(columns + k);
    const Floats magnitude = v < 0.0f ? -v : v;
    most = magnitude > most ? magnitude : most;
    none = none + v * 0.0f;
  }
  // a lane adds size / 8 products, on machines of 8 lanes
  const float room = std::min<int64_t>(32767, (int64_t(1) << 31) / (127 * (size / 8)) - 1);
  const float top = largest(most);
  const Floats inverse = all(top > 1e-30f ? room / top : 0.0f);
  for (int64_t k = 0; k < size; k += LANES) {
    const Floats v = load_floats(x + k) * load_floats(columns + k);
    store_as(to + k, __builtin_convertvector((Bits)(v * inverse + WHOLE), HalfBits));
  }
  return top / room + sum(none);
}

}  // namespace loralab
