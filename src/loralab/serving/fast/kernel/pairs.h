// Low-rank pairs: their layout, and what they add to a product's outputs.
#pragma once

#include "products.h"

namespace loralab {

// A low-rank pair, ready for use: A is (rank, in), B is cut in tiles of COLUMNS outputs, each
// (rank / PER_LANE, COLUMNS, PER_LANE). rank is padded to a multiple of 4; 0 where there is none.
struct Pair {
  const void* A;
  const void* B;
  int64_t rank;
  double scale;
};

template <class T>
constexpr int PER_LANE = sizeof(float) / sizeof(T);

constexpr int EXPANDED = 4;  // rows that B's tile is read for at a time

// A register of B's tile times PER_LANE ranks of a hidden row, added to the sums.
inline Floats add_ranks(Floats sum, const float* hidden, Floats b) { return sum + *hidden * b; }
#if defined(__AVX512BF16__)
inline Floats add_ranks(Floats sum, const bf16* hidden, Bits b) {
  return Pack<bf16>::dot(sum, load_as<uint32_t>(hidden) - Bits{}, b);
}
#else
inline Floats add_ranks(Floats sum, const float* hidden, Bits b) {
  sum = sum + hidden[0] * (Floats)(b << 16);
  return sum + hidden[1] * (Floats)(b & 0xffff0000u);
}
#endif

template <class T, int ROWS>
inline void expand(float (*const* tile)[COLUMNS], const Factor<T>* const* hidden, const T* B,
                   int64_t rank) {
  using Register = std::conditional_t<PER_LANE<T> == 1, Floats, Bits>;
  constexpr int NUM = 2;  // registers of a row at a time
  for (int n = 0; n < COLUMNS; n += NUM * LANES) {
    Floats sum[ROWS][NUM];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < NUM; ++i) sum[m][i] = load_floats(*tile[m] + n + i * LANES);
    const T* at = B + n * PER_LANE<T>;
    for (int64_t r = 0; r < rank; r += PER_LANE<T>, at += COLUMNS * PER_LANE<T>) {
#pragma GCC unroll 4
      for (int i = 0; i < NUM; ++i) {
        const auto b = load_as<Register>(at + i * LANES * PER_LANE<T>);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) sum[m][i] = add_ranks(sum[m][i], hidden[m] + r, b);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < NUM; ++i) store_floats(*tile[m] + n + i * LANES, sum[m][i]);
  }
}

// Adds B's tile times each hidden row to that row of outputs; at most EXPANDED rows.
template <class T>
inline void expand(float (*const* tile)[COLUMNS], const Factor<T>* const* hidden, int rows,
                   const T* B, int64_t rank) {
  switch (rows) {
    case 1: return expand<T, 1>(tile, hidden, B, rank);
    case 2: return expand<T, 2>(tile, hidden, B, rank);
    case 3: return expand<T, 3>(tile, hidden, B, rank);
    default: return expand<T, 4>(tile, hidden, B, rank);
  }
}

inline int64_t padded(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

}  // namespace loralab
