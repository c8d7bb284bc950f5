// A register of fp32 numbers at a time, in the compiler's own vector types: the same source gives
// AVX-512, AVX2 or NEON code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace loralab {

#if defined(__AVX512F__)
constexpr int BYTES = 64;  // of a register
#else
constexpr int BYTES = 32;  // two of NEON's
#endif
constexpr int LANES = BYTES / 4;

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(BYTES / 2)));
typedef float Four __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;
};

template <class V>
inline V load_as(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
inline void store_as(void* to, const V& value) {
  std::memcpy(to, &value, sizeof(V));
}

inline Floats all(float value) { return value - Floats{}; }

// A value that is in a register: compilers like to read it from memory again at each use.
template <class V>
inline V held(V value) {
#if defined(__AVX__)
  asm("" : "+v"(value));
#endif
  return value;
}

// Rounds to the nearest bf16, ties to even; NaN stays NaN.
inline HalfBits rounded(Floats x) {
#if defined(__AVX512BF16__)
  return (HalfBits)_mm512_cvtneps_pbh((__m512)x);
#else
  Bits bits = (Bits)x;
  Bits up = bits + 0x7fff + ((bits >> 16) & 1);
  Bits quiet = bits | 0x400000;
  return __builtin_convertvector((x == x ? up : quiet) >> 16, HalfBits);
#endif
}

inline Floats load_floats(const float* from) { return load_as<Floats>(from); }
inline Floats load_floats(const bf16* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // the same; compilers make six instructions of it
  return (Floats)((Bits)_mm256_cvtepu16_epi32(load_as<__m128i>(from)) << 16);
#else
  return (Floats)(__builtin_convertvector(load_as<HalfBits>(from), Bits) << 16);
#endif
}
inline void store_floats(float* to, Floats x) { store_as(to, x); }
inline void store_floats(bf16* to, Floats x) { store_as(to, rounded(x)); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  return load_as<float>(&bits);
}
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) { return bf16{rounded(all(x))[0]}; }

// The sums of four vectors' lanes.
inline Four sums(Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX512F__)
  auto low = [](Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  };
  auto high = [](Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  Floats ab = low(a, b) + high(a, b), cd = low(c, d) + high(c, d);
  Floats each =
      __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
      __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  Four parts[4];
  std::memcpy(parts, &each, sizeof(parts));
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
#else
  auto low = [](Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13);
  };
  auto high = [](Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
  };
  Floats ab = low(a, b) + high(a, b), cd = low(c, d) + high(c, d);
  Floats each = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  Four parts[2];
  std::memcpy(parts, &each, sizeof(parts));
  return parts[0] + parts[1];
#endif
}

inline float sum(Floats a) { return sums(a, a, a, a)[0]; }

inline float largest(Floats a) {
  float most = a[0];
  for (int i = 1; i < LANES; ++i) most = std::max(most, float(a[i]));
  return most;
}

// Adding it rounds to a whole number, which is then in the lowest bits.
constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23

// e^x to 2 units in the last place; 0 far below.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  Floats whole = (x * 1.44269504f + WHOLE) - WHOLE;
  Floats f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  Floats power = (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
  return (p * f * f + f + 1.0f) * power;
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

inline Floats activate(int64_t kind, Floats x) {
  if (kind == SILU) return x / (1.0f + exponential(-x));
  if (kind == GELU_TANH) {
    Floats u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-2.0f * u));
  }
  Floats y = x;
  for (int i = 0; i < LANES; ++i) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  return y;
}

}  // namespace loralab
