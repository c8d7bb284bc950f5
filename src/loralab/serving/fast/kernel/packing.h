// An adapter's factors, from fp32 row by row to the form that the products read.
#pragma once

#include "pairs.h"

namespace loralab {

// One pair's fp32 factors, and where they go in the form of `Pair`.
struct Packing {
  const float* A;
  const float* B;
  int64_t rank, in, out;
  void* to_A;
  void* to_B;
};

// The same numbers as T, rounded as `store_floats` does; written so that compilers make a loop of
// vectors of it on every processor.
inline void narrow(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, count * sizeof(float));
}
inline void narrow(const float* from, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = load_as<uint32_t>(from + i);
    const uint32_t up = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i].bits = uint16_t((is_nan ? quiet : up) >> 16);
  }
}

// COLUMNS rows of B (fewer at its end) as one tile: ranks that are multiplied together side by side.
template <class T>
void pack_tile(const float* B, int64_t rows, int64_t rank, int64_t to_rank, T* to) {
  constexpr int PER = PER_LANE<T>;
  for (int64_t r = 0; r < to_rank; r += LANES) {
    T block[COLUMNS][LANES] = {};
    if (rank - r >= LANES) {  // a count that the compiler knows
      for (int64_t n = 0; n < rows; ++n) narrow(B + n * rank + r, LANES, block[n]);
    } else if (rank > r) {
      for (int64_t n = 0; n < rows; ++n) narrow(B + n * rank + r, rank - r, block[n]);
    }
    const int64_t end = std::min<int64_t>(LANES, to_rank - r);
    for (int64_t i = 0; i < end; i += PER)
      for (int64_t n = 0; n < COLUMNS; ++n)
        std::memcpy(to + (r + i) * COLUMNS + n * PER, &block[n][i], PER * sizeof(T));
  }
}

template <class T>
void pack(const Packing& job) {
  const int64_t rank = padded(job.rank, 4);
  T* A = static_cast<T*>(job.to_A);
  narrow(job.A, job.rank * job.in, A);
  std::fill(A + job.rank * job.in, A + rank * job.in, T{});
  for (int64_t n = 0; n < job.out; n += COLUMNS)
    pack_tile(job.B + n * job.rank, std::min<int64_t>(COLUMNS, job.out - n), job.rank, rank,
              static_cast<T*>(job.to_B) + n * rank);
}

}  // namespace loralab
