// Vectors as wide as the processor's registers, rows of fp32 or bf16 numbers, and products of small
// matrices that lie in a core's cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace loralab {

#if defined(__AVX512F__) || defined(LORALAB_WIDE)  // the latter to test it anywhere
constexpr int WIDTH = 16, TALL = 12;  // numbers in a register; rows of a tile of sums
#else
constexpr int WIDTH = 8, TALL = 6;
#endif
constexpr int COLUMNS = 16;  // of a tile of sums: widths of all matrices are multiples of it
constexpr int PARTS = COLUMNS / WIDTH;

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Whole __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));

struct bf16 {
  uint16_t bits;
};

inline Vector all(float value) { return value - Vector{}; }

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline Vector load(const bf16* from) {
  Halves value;
  std::memcpy(&value, from, sizeof(value));
  return (Vector)(__builtin_convertvector(value, Bits) << 16);
}
inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof(value)); }
inline void store(bf16* to, Vector value) {  // to the nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &half, sizeof(half));
#else
  Bits bits = (Bits)value;
  Bits up = bits + 0x7fff + ((bits >> 16) & 1);
  Halves half = __builtin_convertvector((value == value ? up : bits | 0x400000) >> 16, Halves);
  std::memcpy(to, &half, sizeof(half));
#endif
}

inline float total(Vector value) {
  float sum = 0;
  for (int i = 0; i < WIDTH; ++i) sum += value[i];
  return sum;
}

// e^x to 2 units in the last place; 0 far below.
inline Vector exponential(Vector x) {
  const Vector shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  Vector inside = x < -87.0f ? all(-87.0f) : x;
  inside = inside > 88.0f ? all(88.0f) : inside;
  Vector whole = (inside * 1.44269504f + shift) - shift;
  Vector f = inside - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  Vector power = (Vector)((__builtin_convertvector(whole, Whole) + 127) << 23);
  Vector result = (p * f * f + f + 1.0f) * power;
  result = x < -87.0f ? all(0.0f) : result;
  return x == x ? result : x;  // NaN stays NaN
}

// A matrix on the left of a product, whose entry (i, p) is at[i * row + p * step], and one on the
// right, whose entry (p, j) is at[p * row + j].
struct Left {
  const float* at;
  int64_t row, step = 1;
};
struct Right {
  const float* at;
  int64_t row;
};

// One tile: M rows and N vectors of columns of `to` become (or gain, if `add`) left times right.
template <int M, int N>
inline void tile(int64_t depth, Left left, Right right, float* to, int64_t to_row, bool add) {
  Vector sums[M][N];
#pragma GCC unroll 16  // all loops but the long one are unrolled, so that sums stay in registers
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[i][v] = Vector{};
  for (int64_t p = 0; p < depth; ++p) {
    Vector line[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) line[v] = load(right.at + p * right.row + v * WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      Vector factor = all(left.at[i * left.row + p * left.step]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sums[i][v] += factor * line[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      float* place = to + i * to_row + v * WIDTH;
      store(place, add ? load(place) + sums[i][v] : sums[i][v]);
    }
}

template <int M, int N>
inline void last_tile(int rows, int64_t depth, Left left, Right right, float* to, int64_t to_row,
                      bool add) {
  if constexpr (M > 0) {
    if (rows == M)
      tile<M, N>(depth, left, right, to, to_row, add);
    else
      last_tile<M - 1, N>(rows, depth, left, right, to, to_row, add);
  }
}

// `to` (rows, columns) becomes (or gains, if `add`) left (rows, depth) times right (depth, columns), in
// tiles of N vectors of columns, by which `columns` can be divided.
template <int N = PARTS>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, float* to,
                     int64_t to_row, bool add) {
  constexpr int tall = N == PARTS ? TALL : 8;
  for (int64_t j = 0; j < columns; j += N * WIDTH) {
    Right lines{right.at + j, right.row};
    for (int64_t i = 0; i < rows; i += tall) {
      Left part{left.at + i * left.row, left.row, left.step};
      float* place = to + i * to_row + j;
      if (rows - i >= tall)
        tile<tall, N>(depth, part, lines, place, to_row, add);
      else
        last_tile<tall - 1, N>(int(rows - i), depth, part, lines, place, to_row, add);
    }
  }
}

inline int64_t padded(int64_t size) { return (size + COLUMNS - 1) / COLUMNS * COLUMNS; }

}  // namespace loralab
