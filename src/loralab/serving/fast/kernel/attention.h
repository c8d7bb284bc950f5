// Rotary positions, and the attention of one token over what its slot holds.
#pragma once

#include "lanes.h"

namespace loralab {

constexpr int MOST_HEADS = 4;  // query heads that read the same keys and values together

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

// Scores in place become weights that add up to the number it gives. Room for count + LANES.
inline float soften(float* scores, int64_t count) {
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
    Floats e = x == -INFINITY ? Floats{} : exponential(x - top);
    store_floats(scores + s, e);
    total = total + e;
  }
  return sum(total);
}

template <class T, int HEADS>
void attend(const T* q, const T* keys, const T* values, int64_t count, int64_t size, float* scores,
            int64_t room, T* to) {
  const float scale = 1.0f / std::sqrt(float(size));
  const int64_t last = (count - 1) * size;
  for (int64_t s = 0; s < count; s += 4) {
    const T* k[4];
    for (int i = 0; i < 4; ++i) k[i] = keys + std::min((s + i) * size, last);
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h) {
      Floats dot[4] = {Floats{}, Floats{}, Floats{}, Floats{}};
      for (int64_t d = 0; d < size; d += PACK<T>) {
        auto a = load_pack(q + h * size + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) dot[i] = Pack<T>::dot(dot[i], a, load_pack(k[i] + d));
      }
      store_as(scores + h * room + s, sums(dot[0], dot[1], dot[2], dot[3]) * scale);
    }
  }
  float share[HEADS];
  for (int h = 0; h < HEADS; ++h) share[h] = 1.0f / soften(scores + h * room, count);
  for (int64_t d = 0; d < size; d += 2 * LANES) {
    Floats sum[HEADS][2];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h) sum[h][0] = sum[h][1] = Floats{};
    for (int64_t s = 0; s < count; ++s) {
      Floats low = load_floats(values + s * size + d);
      Floats high = load_floats(values + s * size + d + LANES);
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h) {
        const float weight = scores[h * room + s];
        sum[h][0] = sum[h][0] + weight * low;
        sum[h][1] = sum[h][1] + weight * high;
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h) {
      store_floats(to + h * size + d, sum[h][0] * share[h]);
      store_floats(to + h * size + d + LANES, sum[h][1] * share[h]);
    }
  }
}

// softmax(q k' / sqrt(size)) v for the queries of `heads` heads over `count` tokens.
// scores: MOST_HEADS times `room` numbers, where room is at least count + LANES.
template <class T>
void attend(int64_t heads, const T* q, const T* keys, const T* values, int64_t count, int64_t size,
            float* scores, int64_t room, T* to) {
  for (; heads > 0; heads -= MOST_HEADS, q += MOST_HEADS * size, to += MOST_HEADS * size) {
    switch (heads) {
      case 1: attend<T, 1>(q, keys, values, count, size, scores, room, to); break;
      case 2: attend<T, 2>(q, keys, values, count, size, scores, room, to); break;
      case 3: attend<T, 3>(q, keys, values, count, size, scores, room, to); break;
      default: attend<T, 4>(q, keys, values, count, size, scores, room, to);
    }
  }
}

}  // namespace loralab
