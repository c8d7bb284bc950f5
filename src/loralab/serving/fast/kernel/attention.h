// Rotary positions, and the attention of one token over what its slot holds.
#pragma once

#include "products.h"

namespace loralab {

constexpr int MOST_HEADS = LANES == 16 ? 4 : 3;  // query heads that read the same keys and values
constexpr int VALUES = 32 / LANES;               // registers of values read at a time

// Turns one head (2104.09864): its two halves against each other.
template <class T>
void rotate(const float* head, int64_t size, const float* cos, const float* sin, T* to) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    Floats a = load_floats(head + i), b = load_floats(head + half + i);
    store_floats(to + i, a * load_floats(cos + i) - b * load_floats(sin + i));
    store_floats(to + half + i,
                 b * load_floats(cos + half + i) + a * load_floats(sin + half + i));
  }
}

// Scores in place become weights: exp(scale * score), the largest of them 1. Gives their sum. Room for
// count + LANES.
inline float soften(float* scores, int64_t count, float scale) {
  store_floats(scores + count, all(-INFINITY));
  Floats most = all(-INFINITY);
  for (int64_t s = 0; s < count; s += LANES) {
    Floats x = load_floats(scores + s);
    most = x > most ? x : most;
  }
  const Floats top = all(largest(most));
  Floats total = {};
  for (int64_t s = 0; s < count; s += LANES) {
    Floats x = load_floats(scores + s);
    Floats e = x == -INFINITY ? Floats{} : exponential((x - top) * scale);
    store_floats(scores + s, e);
    total = total + e;
  }
  return sum(total);
}

template <class T, int HEADS>
void attend(const Factor<T>* q, const T* keys, const T* values, int64_t count, int64_t size,
            float* scores, int64_t room, Factor<T>* to) {
  const Factor<T>* queries[HEADS];
  for (int h = 0; h < HEADS; ++h) queries[h] = q + h * size;
  const int64_t last = (count - 1) * size;
  for (int64_t s = 0; s < count; s += TOGETHER) {
    const T* k[TOGETHER];
    for (int i = 0; i < TOGETHER; ++i) k[i] = keys + std::min((s + i) * size, last);
    dots<T, TOGETHER>(HEADS, queries, k, size, scores + s, room);
  }
  const float scale = 1.0f / std::sqrt(float(size));
  float share[HEADS];
  for (int h = 0; h < HEADS; ++h) share[h] = 1.0f / soften(scores + h * room, count, scale);
  for (int64_t d = 0; d < size; d += VALUES * LANES) {
    Floats sum[HEADS][VALUES];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < VALUES; ++i) sum[h][i] = Floats{};
    for (int64_t s = 0; s < count; ++s) {
      Floats weight[HEADS];
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h) weight[h] = all(scores[h * room + s]);
#pragma GCC unroll 4
      for (int i = 0; i < VALUES; ++i) {
        const Floats value = load_floats(values + s * size + d + i * LANES);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h) sum[h][i] = sum[h][i] + weight[h] * value;
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < VALUES; ++i)
        store_floats(to + h * size + d + i * LANES, sum[h][i] * share[h]);
  }
}

// softmax(q k' / sqrt(size)) v for the queries of `heads` heads over `count` tokens.
// scores: MOST_HEADS times `room` numbers, where room is at least count + LANES.
template <class T>
void attend(int64_t heads, const Factor<T>* q, const T* keys, const T* values, int64_t count,
            int64_t size, float* scores, int64_t room, Factor<T>* to) {
  for (; heads > 0; heads -= MOST_HEADS, q += MOST_HEADS * size, to += MOST_HEADS * size) {
    switch (std::min<int64_t>(heads, MOST_HEADS)) {
      case 1: attend<T, 1>(q, keys, values, count, size, scores, room, to); break;
      case 2: attend<T, 2>(q, keys, values, count, size, scores, room, to); break;
      case 3: attend<T, 3>(q, keys, values, count, size, scores, room, to); break;
      default: attend<T, MOST_HEADS>(q, keys, values, count, size, scores, room, to);
    }
  }
}

}  // namespace loralab
