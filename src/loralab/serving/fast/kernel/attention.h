// Rotary positions and the attention of one token over what its slot holds.
#pragma once

#include "lanes.h"

namespace loralab {

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

// softmax(q k' / sqrt(size)) v of one query over `count` tokens; scores: room for count + LANES.
template <class T>
void attend(const T* q, const T* keys, const T* values, int64_t count, int64_t size, float* scores,
            T* to) {
  const float scale = 1.0f / std::sqrt(float(size));
  const int64_t last = (count - 1) * size;
  for (int64_t s = 0; s < count; s += 4) {
    const T* k[4];
    for (int i = 0; i < 4; ++i) k[i] = keys + std::min((s + i) * size, last);
    Floats sum[4] = {};
    for (int64_t d = 0; d < size; d += PACK<T>) {
      auto a = load_pack(q + d);
      for (int i = 0; i < 4; ++i) sum[i] = Pack<T>::dot(sum[i], a, load_pack(k[i] + d));
    }
    store_as(scores + s, sums(sum[0], sum[1], sum[2], sum[3]) * scale);
  }
  for (int64_t s = count; s < count + LANES; ++s) scores[s] = -INFINITY;
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
  const float share = 1.0f / sum(total);
  for (int64_t d = 0; d < size; d += 2 * LANES) {
    Floats low = {}, high = {};
    for (int64_t s = 0; s < count; ++s) {
      const T* v = values + s * size + d;
      low = low + scores[s] * load_floats(v);
      high = high + scores[s] * load_floats(v + LANES);
    }
    store_floats(to + d, low * share);
    store_floats(to + d + LANES, high * share);
  }
}

}  // namespace loralab
