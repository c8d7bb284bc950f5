// Attention with rotary positions for short rows, forward and backward, from the projections' rows
// to the rows that the output layer reads. A row of the batch and the heads that share keys at a
// time, all of it in a core's cache; the backward pass makes the weights again.
#pragma once

#include "low_rank.h"

namespace loralab {

struct Attention {
  int64_t batch, tokens, heads, groups, size, num_wanted, num_threads;
  float scale;
  const void *q, *k, *v;      // rows: (batch * tokens, heads * size), (batch * tokens, groups * size)
  const void *cos, *sin;      // (batch or 1, tokens, size)
  int64_t angles_row;         // numbers from one row's angles to the next's; 0: the same for all
  const void* mask;           // null: a query looks at itself and what is before it
  int64_t mask_is_added;      // 0: bytes, 1 where a query may look; 1: numbers that are added
  int64_t mask_row, mask_query, mask_key;  // strides, in entries
  const int64_t* wanted;      // (batch, num_wanted) positions of the queries; null: every token
  void* out;                  // rows (batch * num_wanted, heads * size)
  const void* g;              // the gradient of `out`
  void *grad_q, *grad_k, *grad_v;
};

struct Room {  // a thread's own memory
  Scratch k, v, k_turned, v_turned, q, weights, g, out, grad_weights, grad_k, grad_v;
};

// One head of one token with its position turned in (2104.09864).
template <class T>
inline void turn_in(const Attention& a, int64_t b, int64_t position, const T* from, float* to) {
  const int64_t half = a.size / 2, at = b * a.angles_row + position * a.size;
  const T *c = (const T*)a.cos + at, *s = (const T*)a.sin + at;
  for (int64_t j = 0; j < half; j += WIDTH) {
    Vector low = load(from + j), high = load(from + half + j);
    store(to + j, low * load(c + j) - high * load(s + j));
    store(to + half + j, high * load(c + half + j) + low * load(s + half + j));
  }
}

// The transpose of `turn_in`.
template <class T>
inline void turn_out(const Attention& a, int64_t b, int64_t position, const float* from, T* to) {
  const int64_t half = a.size / 2, at = b * a.angles_row + position * a.size;
  const T *c = (const T*)a.cos + at, *s = (const T*)a.sin + at;
  for (int64_t j = 0; j < half; j += WIDTH) {
    Vector low = load(from + j), high = load(from + half + j);
    store(to + j, low * load(c + j) + high * load(s + half + j));
    store(to + half + j, high * load(c + half + j) - low * load(s + j));
  }
}

template <class T>
inline void copy_row(const T* from, int64_t count, float* to) {
  for (int64_t j = 0; j < count; j += WIDTH) store(to + j, load(from + j));
}

inline void turn_rows(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) to[j * rows + i] = from[i * columns + j];
}

inline float as_float(const float* from) { return *from; }
inline float as_float(const bf16* from) {
  uint32_t bits = uint32_t(from->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The scores of one query become its weights; places beyond the tokens become 0.
template <class T>
inline void weigh(const Attention& a, int64_t b, int64_t position, float* row, int64_t wide) {
  constexpr float NEVER = -3.0e38f;
  float most = NEVER;
  for (int64_t t = 0; t < a.tokens; ++t) {
    float score = row[t] * a.scale;
    const int64_t at = b * a.mask_row + position * a.mask_query + t * a.mask_key;
    if (a.mask == nullptr)
      score = t > position ? NEVER : score;
    else if (a.mask_is_added)
      score += as_float((const T*)a.mask + at);
    else if (!((const uint8_t*)a.mask)[at])
      score = NEVER;
    row[t] = score < NEVER ? NEVER : score;  // a NaN stays one
    most = std::max(most, row[t]);
  }
  for (int64_t t = a.tokens; t < wide; ++t) row[t] = -INFINITY;
  Vector sum = {};
  for (int64_t t = 0; t < wide; t += WIDTH) {
    Vector e = exponential(load(row + t) - most);
    store(row + t, e);
    sum += e;
  }
  const float inverse = 1.0f / total(sum);
  for (int64_t t = 0; t < wide; t += WIDTH) store(row + t, load(row + t) * inverse);
}

template <class T>
struct Group {  // the heads of one row of the batch that share keys and values
  const Attention& a;
  Room& room;
  int64_t b, group, wide;

  int64_t num_heads() const { return a.heads / a.groups; }
  int64_t head(int64_t number) const { return group * num_heads() + number; }
  int64_t position(int64_t query) const {
    return a.wanted ? a.wanted[b * a.num_wanted + query] : query;
  }
  int64_t key_at(int64_t token) const {
    return ((b * a.tokens + token) * a.groups + group) * a.size;
  }
  int64_t query_at(int64_t head, int64_t query) const {
    return ((b * a.tokens + position(query)) * a.heads + head) * a.size;
  }
  int64_t out_at(int64_t head, int64_t query) const {
    return ((b * a.num_wanted + query) * a.heads + head) * a.size;
  }

  void read_keys() {
    float *k = sized(room.k, wide * a.size), *v = sized(room.v, wide * a.size);
    for (int64_t t = 0; t < a.tokens; ++t) {
      turn_in(a, b, t, (const T*)a.k + key_at(t), k + t * a.size);
      copy_row((const T*)a.v + key_at(t), a.size, v + t * a.size);
    }
    std::fill(k + a.tokens * a.size, k + wide * a.size, 0.0f);
    std::fill(v + a.tokens * a.size, v + wide * a.size, 0.0f);
    turn_rows(k, wide, a.size, sized(room.k_turned, wide * a.size));
  }

  // The head's queries, and what weight they give to each token.
  void read_queries(int64_t head) {
    float* q = sized(room.q, a.num_wanted * a.size);
    for (int64_t i = 0; i < a.num_wanted; ++i)
      turn_in(a, b, position(i), (const T*)a.q + query_at(head, i), q + i * a.size);
    float* weights = sized(room.weights, a.num_wanted * wide);
    multiply(a.num_wanted, wide, a.size, {q, a.size}, {room.k_turned.data(), wide}, weights, wide, false);
    for (int64_t i = 0; i < a.num_wanted; ++i) weigh<T>(a, b, position(i), weights + i * wide, wide);
  }

  void forward() {
    read_keys();
    float* out = sized(room.out, a.num_wanted * a.size);
    for (int64_t number = 0; number < num_heads(); ++number) {
      read_queries(head(number));
      multiply(a.num_wanted, a.size, wide, {room.weights.data(), wide}, {room.v.data(), a.size}, out,
               a.size, false);
      for (int64_t i = 0; i < a.num_wanted; ++i)
        for (int64_t j = 0; j < a.size; j += WIDTH)
          store((T*)a.out + out_at(head(number), i) + j, load(out + i * a.size + j));
    }
  }

  void backward() {
    read_keys();
    float* v_turned = sized(room.v_turned, wide * a.size);
    turn_rows(room.v.data(), wide, a.size, v_turned);
    float *grad_k = sized(room.grad_k, wide * a.size), *grad_v = sized(room.grad_v, wide * a.size);
    float* g = sized(room.g, a.num_wanted * a.size);
    float* grads = sized(room.grad_weights, a.num_wanted * wide);
    float* grad_q = sized(room.out, a.num_wanted * a.size);
    for (int64_t number = 0; number < num_heads(); ++number) {
      const bool add = number > 0;
      read_queries(head(number));
      for (int64_t i = 0; i < a.num_wanted; ++i)
        copy_row((const T*)a.g + out_at(head(number), i), a.size, g + i * a.size);
      const float *weights = room.weights.data(), *q = room.q.data();
      multiply(wide, a.size, a.num_wanted, {weights, 1, wide}, {g, a.size}, grad_v, a.size, add);
      multiply(a.num_wanted, wide, a.size, {g, a.size}, {v_turned, wide}, grads, wide, false);
      for (int64_t i = 0; i < a.num_wanted; ++i) {  // softmax's gradient
        const float* weight = weights + i * wide;
        float* grad = grads + i * wide;
        Vector along = {};
        for (int64_t t = 0; t < wide; t += WIDTH) along += load(weight + t) * load(grad + t);
        const float mean = total(along);
        for (int64_t t = 0; t < wide; t += WIDTH)
          store(grad + t, load(weight + t) * (load(grad + t) - mean) * a.scale);
      }
      multiply(wide, a.size, a.num_wanted, {grads, 1, wide}, {q, a.size}, grad_k, a.size, add);
      multiply(a.num_wanted, a.size, wide, {grads, wide}, {room.k.data(), a.size}, grad_q, a.size, false);
      if (a.wanted)
        for (int64_t t = 0; t < a.tokens; ++t)
          std::fill_n((T*)a.grad_q + ((b * a.tokens + t) * a.heads + head(number)) * a.size, a.size, T{});
      for (int64_t i = 0; i < a.num_wanted; ++i)
        turn_out(a, b, position(i), grad_q + i * a.size, (T*)a.grad_q + query_at(head(number), i));
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      turn_out(a, b, t, grad_k + t * a.size, (T*)a.grad_k + key_at(t));
      for (int64_t j = 0; j < a.size; j += WIDTH)
        store((T*)a.grad_v + key_at(t) + j, load(grad_v + t * a.size + j));
    }
  }
};

template <class T>
void attention(const Attention& a, bool backward) {
#pragma omp parallel for num_threads(a.num_threads) schedule(static)
  for (int64_t number = 0; number < a.batch * a.groups; ++number) {
    static thread_local Room room;
    Group<T> group{a, room, number / a.groups, number % a.groups, padded(a.tokens)};
    if (backward)
      group.backward();
    else
      group.forward();
  }
}

}  // namespace loralab
