// What adapters add to the outputs of layers that read the same input, and its gradients:
// y += s B A (m * x), a block of rows at a time, so that masked inputs never leave the cache.
#pragma once

#include <omp.h>

#include <vector>

#include "vectors.h"

namespace loralab {

constexpr int MOST_LAYERS = 8;

struct Pair {        // of one layer
  const float* B;    // (out, rank)
  int64_t out, rank, start;  // start: of its columns among the ranks of all pairs
  float scale;
  void* rows;        // forward: the output that gains; backward: the output's gradient
  float* grad_B;     // (out, rank)
};

struct LowRank {
  int64_t rows, in, ranks, num_pairs, num_threads;
  const void* x;             // (rows, in)
  const float* A;            // (ranks, in): those of all pairs
  const uint8_t* flips;      // table of coin flips; null without dropout
  const int64_t* places;     // where in the table each row's mask begins
  void* grad_x;              // (rows, in), overwritten; null where unwanted
  float* grad_A;             // (ranks, in)
  Pair pairs[MOST_LAYERS];
};

typedef std::vector<float> Scratch;

inline float* sized(Scratch& scratch, int64_t size) {
  if (int64_t(scratch.size()) < size) scratch.resize(size);
  return scratch.data();
}

inline int64_t block_rows(int64_t width) {
  int64_t fitting = (1 << 16) / width / TALL * TALL;
  return std::clamp<int64_t>(fitting, TALL, 48);
}

inline Vector kept(const uint8_t* flips) {
  typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
  Bytes bytes;
  std::memcpy(&bytes, flips, sizeof(bytes));
  return __builtin_convertvector(bytes, Vector);
}

// Rows as fp32 numbers, kept (1) or dropped (0) as the mask says, in memory of a thread's own, where
// rows are set apart: at a distance of a power of two all of them would fall on the same cache lines.
template <class T>
inline Left own_rows(const T* rows, int64_t count, int64_t width, const uint8_t* flips,
                     const int64_t* places, Scratch& scratch) {
  const int64_t apart = width + COLUMNS;
  float* to = sized(scratch, count * apart);
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* mask = flips ? flips + places[i] : nullptr;
    for (int64_t j = 0; j < width; j += WIDTH) {
      Vector value = load(rows + i * width + j);
      store(to + i * apart + j, mask ? value * kept(mask + j) : value);
    }
  }
  return {to, apart};
}

// A of all pairs, turned: (in, ranks padded).
inline void turn(const float* A, int64_t ranks, int64_t in, float* to, int64_t from_column,
                 int64_t to_column, int64_t width, float scale = 1) {
  for (int64_t j = from_column; j < to_column; ++j) {
    for (int64_t r = 0; r < ranks; ++r) to[j * width + r] = scale * A[r * in + j];
    for (int64_t r = ranks; r < width; ++r) to[j * width + r] = 0;
  }
}

// B of a pair, turned and scaled: (rank, out).
inline void turn_scaled(const Pair& pair, float* to, int64_t from, int64_t until) {
  for (int64_t o = from; o < until; ++o)
    for (int64_t r = 0; r < pair.rank; ++r) to[r * pair.out + o] = pair.scale * pair.B[o * pair.rank + r];
}

template <class T>
inline void add_product(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, T* to) {
  if constexpr (sizeof(T) == 4) {
    multiply(rows, columns, depth, left, right, (float*)to, columns, true);
  } else {
    float sums[TALL * COLUMNS];
    for (int64_t i = 0; i < rows; i += TALL) {
      int64_t tall = std::min<int64_t>(TALL, rows - i);
      for (int64_t j = 0; j < columns; j += COLUMNS) {
        multiply(tall, COLUMNS, depth, {left.at + i * left.row, left.row, left.step},
                 {right.at + j, right.row}, sums, COLUMNS, false);
        for (int64_t a = 0; a < tall; ++a)
          for (int v = 0; v < COLUMNS; v += WIDTH) {
            T* place = to + (i + a) * columns + j + v;
            store(place, load(place) + load(sums + a * COLUMNS + v));
          }
      }
    }
  }
}

struct Range {
  int64_t from, until;
};

inline Range share(int64_t count, int64_t thread, int64_t threads, int64_t multiple = 1) {
  int64_t pieces = (count + multiple - 1) / multiple;
  int64_t from = pieces * thread / threads * multiple, until = pieces * (thread + 1) / threads * multiple;
  return {std::min(from, count), std::min(until, count)};
}

template <class T>
void low_rank_forward(const LowRank& step) {
  const int64_t width = padded(step.ranks), tall = block_rows(step.in);
  static thread_local Scratch turned_A, turned_B;  // the calling thread's, which all read
  float* A = sized(turned_A, step.in * width);
  float* starts[MOST_LAYERS];
  int64_t size = 0;
  for (int64_t l = 0; l < step.num_pairs; ++l) size += step.pairs[l].rank * step.pairs[l].out;
  starts[0] = sized(turned_B, size);
  for (int64_t l = 1; l < step.num_pairs; ++l)
    starts[l] = starts[l - 1] + step.pairs[l - 1].rank * step.pairs[l - 1].out;

#pragma omp parallel num_threads(step.num_threads)
  {
    static thread_local Scratch dropped, hidden;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Range columns = share(step.in, thread, threads);
    turn(step.A, step.ranks, step.in, A, columns.from, columns.until, width);
    for (int64_t l = 0; l < step.num_pairs; ++l) {
      Range own = share(step.pairs[l].out, thread, threads);
      turn_scaled(step.pairs[l], starts[l], own.from, own.until);
    }
#pragma omp barrier
    Range mine = share(step.rows, thread, threads);
    for (int64_t i = mine.from; i < mine.until; i += tall) {
      int64_t rows = std::min(tall, mine.until - i);
      Left x = own_rows((const T*)step.x + i * step.in, rows, step.in, step.flips,
                        step.flips ? step.places + i : nullptr, dropped);
      float* h = sized(hidden, tall * width);
      multiply(rows, width, step.in, x, {A, width}, h, width, false);
      for (int64_t l = 0; l < step.num_pairs; ++l) {
        const Pair& pair = step.pairs[l];
        add_product(rows, pair.out, pair.rank, {h + pair.start, width}, {starts[l], pair.out},
                    (T*)pair.rows + i * pair.out);
      }
    }
  }
}

// grad_x = m * (s (g B) A), the sum over the pairs; grad_A and grad_B of each pair.
template <class T>
void low_rank_backward(const LowRank& step) {
  const int64_t width = padded(step.ranks);
  int64_t widest = step.in, size_B = 0, starts_B[MOST_LAYERS];
  for (int64_t l = 0; l < step.num_pairs; ++l) {
    const Pair& pair = step.pairs[l];
    widest = std::max(widest, pair.out);
    starts_B[l] = size_B;
    size_B += pair.out * padded(pair.rank);
  }
  const int64_t tall = block_rows(widest), size_A = step.ranks * step.in;
  static thread_local Scratch turned_A, wide_B, sums;  // the calling thread's, which all use
  float* A = sized(turned_A, step.in * width);
  float* Bs = sized(wide_B, size_B);
  float* all_sums = sized(sums, step.num_threads * (size_A + size_B));

#pragma omp parallel num_threads(step.num_threads)
  {
    static thread_local Scratch dropped, hidden, grad_hidden, gradients, through;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Range columns = share(step.in, thread, threads);
    turn(step.A, step.ranks, step.in, A, columns.from, columns.until, width);
    for (int64_t l = 0; l < step.num_pairs; ++l) {
      const Pair& pair = step.pairs[l];
      const int64_t wide = padded(pair.rank);
      Range own = share(pair.out, thread, threads);
      for (int64_t o = own.from; o < own.until; ++o)
        for (int64_t r = 0; r < wide; ++r)
          Bs[starts_B[l] + o * wide + r] = r < pair.rank ? pair.scale * pair.B[o * pair.rank + r] : 0;
    }
    float* sums_A = all_sums + thread * (size_A + size_B);
    float* sums_B = sums_A + size_A;
    std::fill(sums_A, sums_B + size_B, 0.0f);
#pragma omp barrier
    Range mine = share(step.rows, thread, threads);
    for (int64_t i = mine.from; i < mine.until; i += tall) {
      const int64_t rows = std::min(tall, mine.until - i);
      Left x = own_rows((const T*)step.x + i * step.in, rows, step.in, step.flips,
                        step.flips ? step.places + i : nullptr, dropped);
      float* h = sized(hidden, tall * (width + COLUMNS));
      multiply(rows, width, step.in, x, {A, width}, h, width, false);
      float* gh = sized(grad_hidden, tall * (width + COLUMNS));
      for (int64_t l = 0; l < step.num_pairs; ++l) {
        const Pair& pair = step.pairs[l];
        const int64_t wide = padded(pair.rank);
        Left g = own_rows((const T*)pair.rows + i * pair.out, rows, pair.out, nullptr, nullptr, gradients);
        // the columns beyond the pair's own are the next pair's, which come later
        float own[48 * COLUMNS];
        for (int64_t r = 0; r < pair.rank; r += COLUMNS) {
          const int64_t count = std::min<int64_t>(COLUMNS, pair.rank - r);
          multiply(rows, COLUMNS, pair.out, g, {Bs + starts_B[l] + r, wide}, own, COLUMNS, false);
          for (int64_t a = 0; a < rows; ++a)
            std::memcpy(gh + a * width + pair.start + r, own + a * COLUMNS, count * sizeof(float));
          for (int64_t a = 0; a < rows; ++a)
            for (int64_t c = 0; c < COLUMNS; ++c)
              own[a * COLUMNS + c] = c < count ? pair.scale * h[a * width + pair.start + r + c] : 0;
          multiply(pair.out, COLUMNS, rows, {g.at, 1, g.row}, {own, COLUMNS}, sums_B + starts_B[l] + r,
                   wide, true);
        }
      }
      multiply(step.ranks, step.in, rows, {gh, 1, width}, {x.at, x.row}, sums_A, step.in, true);
      if (step.grad_x) {
        const int64_t apart = step.in + COLUMNS;
        float* t = sized(through, tall * apart);
        multiply(rows, step.in, step.ranks, {gh, width}, {step.A, step.in}, t, apart, false);
        T* to = (T*)step.grad_x + i * step.in;
        for (int64_t a = 0; a < rows; ++a) {
          const uint8_t* mask = step.flips ? step.flips + step.places[i + a] : nullptr;
          for (int64_t j = 0; j < step.in; j += WIDTH) {
            Vector value = load(t + a * apart + j);
            if (mask) value = value * kept(mask + j);
            store(to + a * step.in + j, value);
          }
        }
      }
    }
#pragma omp barrier
    Range entries = share(size_A, thread, threads);
    for (int64_t j = entries.from; j < entries.until; ++j) {
      float sum = 0;
      for (int64_t t = 0; t < threads; ++t) sum += all_sums[t * (size_A + size_B) + j];
      step.grad_A[j] = sum;
    }
    for (int64_t l = 0; l < step.num_pairs; ++l) {
      const Pair& pair = step.pairs[l];
      const int64_t wide = padded(pair.rank);
      Range own = share(pair.out, thread, threads);
      for (int64_t o = own.from; o < own.until; ++o)
        for (int64_t r = 0; r < pair.rank; ++r) {
          float sum = 0;
          for (int64_t t = 0; t < threads; ++t)
            sum += all_sums[t * (size_A + size_B) + size_A + starts_B[l] + o * wide + r];
          pair.grad_B[o * pair.rank + r] = sum;
        }
    }
  }
}

}  // namespace loralab
