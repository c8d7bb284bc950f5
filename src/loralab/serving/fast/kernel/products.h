// Products of rows with the base's weights and with low-rank pairs. A row's result depends on that
// row and the weights alone, bit for bit: whatever rows stand beside it, its sums run in one order.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace loralab {

constexpr int COLUMNS = 32;  // outputs of one piece of work, and of one tile of B
constexpr int STRIP = 64;    // rows that a tile of outputs holds
constexpr int MOST_ROWS = 6; // rows of one inner product: 6 x 4 sums fill the registers

// A product's outputs before they are stored: fp32, rows x COLUMNS.
struct Tile {
  alignas(64) float at[STRIP][COLUMNS];
};

// Weights come from memory once a step. They are asked for this many bytes before they are read,
// into the second-level cache (measured: nearer or farther is slower).
constexpr int64_t AHEAD_BYTES = 16384;
constexpr int64_t LINE = 64;

inline void ask(const char* at, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(at + i * LINE, 0, 2);
}

// Stretches of memory that are read soon, asked for a few lines at a time while products compute:
// adapters come from memory while the base's products keep the arithmetic units busy.
class Wishes {
 public:
  void clear() { count_ = at_ = 0, lines_ = 0; }
  void add(const void* from, int64_t bytes) {
    if (count_ == MOST) return;
    from_[count_] = static_cast<const char*>(from);
    left_[count_++] = (bytes + LINE - 1) / LINE;
    lines_ += (bytes + LINE - 1) / LINE;
  }
  int64_t lines() const { return lines_; }
  void ask_for(int64_t lines) {
    while (lines > 0 && at_ < count_) {
      const int64_t now = std::min(lines, left_[at_]);
      ask(from_[at_], now);
      from_[at_] += now * LINE;
      left_[at_] -= now;
      lines -= now;
      if (left_[at_] == 0) ++at_;
    }
  }

 private:
  static constexpr int MOST = 256;
  const char* from_[MOST];
  int64_t left_[MOST];
  int count_ = 0, at_ = 0;
  int64_t lines_ = 0;
};

// Some rows of weights, those that the thread reads after them, and what else it reads soon (each
// null where it knows of none).
template <class T>
struct Weights {
  const T* at;
  const T* next;
  Wishes* wishes;
};

// FETCH lines are asked for in each turn, from `ahead` on: where weights are read for few rows, only
// that keeps the memory busy.
template <class T, int ROWS, int NUM, int FETCH>
inline void dots(const T* const* x, const T* w, int64_t size, float* out, int64_t stride,
                 const char* ahead) {
  Floats sum[ROWS][NUM];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NUM; ++n) sum[m][n] = Floats{};
  for (int64_t k = 0; k < size; k += PACK<T>) {
#pragma GCC unroll 4
    for (int f = 0; f < FETCH; ++f) __builtin_prefetch(ahead + 64 * f, 0, 2);
    ahead += 64 * FETCH;
    typename Pack<T>::Type b[NUM];
#pragma GCC unroll 4
    for (int n = 0; n < NUM; ++n) b[n] = load_pack(w + n * size + k);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      auto a = load_pack(x[m] + k);
#pragma GCC unroll 4
      for (int n = 0; n < NUM; ++n) sum[m][n] = Pack<T>::dot(sum[m][n], a, b[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    if constexpr (NUM == 4) {
      store_as(out + m * stride, sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));
    } else {
      for (int n = 0; n < NUM; ++n) out[m * stride + n] = loralab::sum(sum[m][n]);
    }
  }
}

template <class T, int NUM, int FETCH>
inline void dots(int rows, const T* const* x, const T* w, int64_t size, float* out, int64_t stride,
                 const char* ahead) {
  switch (rows) {
    case 1: return dots<T, 1, NUM, FETCH>(x, w, size, out, stride, ahead);
    case 2: return dots<T, 2, NUM, FETCH>(x, w, size, out, stride, ahead);
    case 3: return dots<T, 3, NUM, FETCH>(x, w, size, out, stride, ahead);
    case 4: return dots<T, 4, NUM, FETCH>(x, w, size, out, stride, ahead);
    case 5: return dots<T, 5, NUM, FETCH>(x, w, size, out, stride, ahead);
    default: return dots<T, 6, NUM, FETCH>(x, w, size, out, stride, ahead);
  }
}

// out[row][n] = x[row] . w[n] for n < count; w is (count, size), one row after another.
template <class T>
void multiply(const T* const* x, int rows, Weights<T> w, int count, int64_t size, float* out,
              int64_t stride) {
  const int parts = (rows + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t row_bytes = size * int64_t(sizeof(T)), own = 4 * row_bytes / LINE;
  const int64_t wished = w.wishes == nullptr ? 0 : w.wishes->lines() / (count / 4 * parts + 1) + 1;
  int n = 0;
  for (; n + 4 <= count; n += 4) {
    const T* here = w.at + n * size;
    const int64_t beyond = n * row_bytes + AHEAD_BYTES - count * row_bytes;
    const char* ahead = reinterpret_cast<const char*>(here) + AHEAD_BYTES;
    if (beyond >= 0)
      ahead = w.next == nullptr ? nullptr : reinterpret_cast<const char*>(w.next) + beyond;
    for (int part = 0, first = 0; part < parts; ++part) {
      const int num = (rows - first + parts - part - 1) / (parts - part);
      float* to = out + first * stride + n;
      if (parts == 1 && ahead != nullptr) {
        dots<T, 4, 4>(num, x, here, size, to, stride, ahead);
      } else {
        const int64_t from = own * part / parts;
        if (ahead != nullptr) ask(ahead + from * LINE, own * (part + 1) / parts - from);
        dots<T, 4, 0>(num, x + first, here, size, to, stride, nullptr);
      }
      if (wished > 0) w.wishes->ask_for(wished);
      first += num;
    }
  }
  for (; n < count; ++n) {
    for (int first = 0; first < rows; first += MOST_ROWS) {
      const int num = std::min(rows - first, MOST_ROWS);
      dots<T, 1, 0>(num, x + first, w.at + n * size, size, out + first * stride + n, stride, nullptr);
    }
  }
}

// A low-rank pair, ready for use: A is (rank, in), B is cut in tiles of COLUMNS outputs, each
// (rank / PER_LANE, COLUMNS, PER_LANE). rank is padded to a multiple of 4; 0 where there is none.
struct Pair {
  const void* A;
  const void* B;
  int64_t rank;
  double scale;
};

constexpr int EXPANDED = 4;  // rows that B's tile is read for at a time

template <class T, int ROWS>
inline void expand(float (*const* tile)[COLUMNS], const T* const* hidden, const T* B,
                   int64_t rank) {
  constexpr int PER = Pack<T>::PER_LANE;
  Floats sum[ROWS][2];
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
    sum[m][0] = load_floats(*tile[m]);
    sum[m][1] = load_floats(*tile[m] + LANES);
  }
  for (int64_t r = 0; r < rank; r += PER, B += 2 * PACK<T>) {
    auto b0 = load_pack(B), b1 = load_pack(B + PACK<T>);
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      auto h = Pack<T>::broadcast(hidden[m] + r);
      sum[m][0] = Pack<T>::dot(sum[m][0], h, b0);
      sum[m][1] = Pack<T>::dot(sum[m][1], h, b1);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
    store_floats(*tile[m], sum[m][0]);
    store_floats(*tile[m] + LANES, sum[m][1]);
  }
}

// Adds B's tile times each hidden row to that row of outputs; at most EXPANDED rows.
template <class T>
inline void expand(float (*const* tile)[COLUMNS], const T* const* hidden, int rows, const T* B,
                   int64_t rank) {
  switch (rows) {
    case 1: return expand<T, 1>(tile, hidden, B, rank);
    case 2: return expand<T, 2>(tile, hidden, B, rank);
    case 3: return expand<T, 3>(tile, hidden, B, rank);
    default: return expand<T, 4>(tile, hidden, B, rank);
  }
}

inline int64_t padded(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

}  // namespace loralab
