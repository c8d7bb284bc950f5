// Products of rows with the base's weights. A row's result depends on that row and the weights alone,
// bit for bit: whatever rows stand beside it, its sums run in one order.
#pragma once

#include "factors.h"
#include "pool.h"

namespace loralab {

constexpr int COLUMNS = 32;  // outputs of one piece of work, and of one tile of B
constexpr int STRIP = 64;    // rows that a tile of outputs holds
constexpr int TOGETHER = 4;  // outputs of one inner product

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
template <class W>
struct Weights {
  const W* at;
  const W* next;
  Wishes* wishes;
};

// Memory that is asked for while products compute: a few lines at each step, `pace` bytes apart.
// Where weights are read for few rows, only that keeps the memory busy.
struct Ahead {
  const char* from;
  int64_t pace;
};

// x[row] . w[n] for ROWS rows and NUM rows of weights. FETCH: lines asked for at each step.
// KEEP: what was widened is kept in `panel`, NUM rows of it.
template <class W, int ROWS, int NUM, int FETCH, bool KEEP>
inline void dots(const Factor<W>* const* x, const W* const* w, int64_t size, float* out,
                 int64_t stride, Ahead ahead, Factor<W>* panel) {
  using P = Pack<Factor<W>>;
  typename P::Sum sum[ROWS][NUM];
  const Factor<W>* rows[ROWS];
  const W* weights[NUM];
  for (int m = 0; m < ROWS; ++m) rows[m] = x[m];
  for (int n = 0; n < NUM; ++n) weights[n] = w[n];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NUM; ++n) sum[m][n] = typename P::Sum{};
  for (int64_t k = 0; k < size; k += PACK<W>) {
#pragma GCC unroll 4
    for (int f = 0; f < FETCH; ++f, ahead.from += ahead.pace) __builtin_prefetch(ahead.from, 0, 2);
    typename P::Type a[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) a[m] = held(load_factors(rows[m] + k));
#pragma GCC unroll 4
    for (int n = 0; n < NUM; ++n) {
      const auto b = held(load_factors(weights[n] + k));
      if constexpr (KEEP) store_as(panel + n * size + k, b);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) sum[m][n] = P::dot(sum[m][n], a[m], b);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    if constexpr (NUM == TOGETHER) {
      store_as(out + m * stride, sums(as_floats(sum[m][0]), as_floats(sum[m][1]),
                                      as_floats(sum[m][2]), as_floats(sum[m][3])));
    } else {
      for (int n = 0; n < NUM; ++n) out[m * stride + n] = loralab::sum(as_floats(sum[m][n]));
    }
  }
}

template <class W, int NUM, int FETCH = 0, bool KEEP = false>
inline void dots(int rows, const Factor<W>* const* x, const W* const* w, int64_t size, float* out,
                 int64_t stride, Ahead ahead = {}, Factor<W>* panel = nullptr) {
  constexpr int MOST = Pack<Factor<W>>::MOST_ROWS;
  switch (rows) {
#define LORALAB_ROWS(ROWS) \
  case ROWS:               \
    return dots<W, std::min(ROWS, MOST), NUM, FETCH, KEEP>(x, w, size, out, stride, ahead, panel)
    LORALAB_ROWS(1);
    LORALAB_ROWS(2);
    LORALAB_ROWS(3);
    LORALAB_ROWS(4);
    LORALAB_ROWS(5);
    LORALAB_ROWS(6);
#undef LORALAB_ROWS
  }
}

template <class W>
constexpr int FETCH = TOGETHER * PACK<W> * sizeof(W) / LINE;  // as many lines as a step reads

// More rows than one inner product takes, in parts; weights that must be widened are so once.
// between: called after each part.
template <class W, class Between>
void multiply_parts(const Factor<W>* const* x, int rows, int parts, const W* const* w,
                    int64_t size, float* out, int64_t stride, Ahead ahead, Between between) {
  using F = Factor<W>;
  constexpr bool WIDENS = !std::is_same_v<W, F>;
  static thread_local Room room;
  F* panel = WIDENS ? room.of<F>(TOGETHER * size) : nullptr;
  const F* wide[TOGETHER];
  for (int i = 0; i < TOGETHER; ++i) {
    if constexpr (WIDENS) wide[i] = panel + i * size;
    else wide[i] = w[i];
  }
  for (int part = 0, first = 0; part < parts; ++part) {
    const int num = (rows - first + parts - part - 1) / (parts - part);
    float* to = out + first * stride;
    if (WIDENS && part == 0)
      dots<W, TOGETHER, FETCH<W>, WIDENS>(num, x, w, size, to, stride, ahead, panel);
    else
      dots<F, TOGETHER, FETCH<W>>(num, x + first, wide, size, to, stride, ahead);
    ahead.from += TOGETHER * size * int64_t(sizeof(W)) / LINE * ahead.pace;
    first += num;
    between();
  }
}

// out[row][n] = x[row] . w[n] for n < count; w is (count, size), one row after another.
template <class W>
void multiply(const Factor<W>* const* x, int rows, Weights<W> w, int count, int64_t size,
              float* out, int64_t stride) {
  constexpr int MOST = Pack<Factor<W>>::MOST_ROWS;
  const int parts = (rows + MOST - 1) / MOST;
  const int64_t row_bytes = size * int64_t(sizeof(W)), pace = LINE / parts;
  const int64_t wished =
      w.wishes == nullptr ? 0 : w.wishes->lines() / (count / TOGETHER * parts + 1) + 1;
  auto between = [&] {
    if (wished > 0) w.wishes->ask_for(wished);
  };
  int n = 0;
  for (; n + TOGETHER <= count; n += TOGETHER) {
    const W* here[TOGETHER];
    for (int i = 0; i < TOGETHER; ++i) here[i] = w.at + (n + i) * size;
    const int64_t beyond = (n - count) * row_bytes + AHEAD_BYTES;
    Ahead ahead{reinterpret_cast<const char*>(here[0]) + AHEAD_BYTES, pace};
    if (beyond >= 0) ahead.from = reinterpret_cast<const char*>(w.next) + beyond;
    if (beyond >= 0 && w.next == nullptr) ahead = {reinterpret_cast<const char*>(here[0]), 0};
    if (parts == 1) {
      dots<W, TOGETHER, FETCH<W>>(rows, x, here, size, out + n, stride, ahead);
      between();
    } else {
      multiply_parts(x, rows, parts, here, size, out + n, stride, ahead, between);
    }
  }
  for (; n < count; ++n) {
    const W* here = w.at + n * size;
    for (int first = 0; first < rows; first += MOST)
      dots<W, 1>(std::min(rows - first, MOST), x + first, &here, size, out + first * stride + n,
                 stride);
  }
}

}  // namespace loralab
