// A decoding step: flat tokens of many sequences, each with its own adapters, through all blocks.
//
//   n = norm(x)    a = attention(rotary(Q n), rotary(K n), V n)    x = x + O a
//   m = norm(x)    x = x + Down(act(Gate m) * Up m)                logits = Output norm(x)
//
// x and all sums are fp32. W: the type of the base's weights; T: that of pairs, biases and the cache.
// Products read factors of T, those of the base factors of W.
#pragma once

#include "attention.h"
#include "model.h"

namespace loralab {

constexpr int RANKS = 16;  // rows of A in one piece of work

// A piece of one of several projections; at: where the projection's outputs start.
struct Part {
  int which;
  int64_t piece, at, width;
};

// What a product of the base reads: rows of factors and, where they are whole numbers, their scales.
template <class W>
struct Inputs {
  const Factor<W>* at;
  const float* scales;
  int64_t size;
};

// What lives between the phases; kept from step to step.
struct Workspace {
  Room normed, whole, row_scales, qkv, queries, attended, gated, hidden, scores;
};

template <class W, class T>
class Run {
 public:
  using F = Factor<T>;

  Run(const Model& model, const Step& step, Team& team, Workspace& space)
      : model_(model), step_(step), team_(team) {
    const int64_t tokens = step.num_tokens;
    q_width_ = model.num_heads * model.head_size;
    kv_width_ = model.num_kv_heads * model.head_size;
    normed_ = space.normed.of<F>(std::max(tokens, step.num_wanted) * model.width);
    qkv_ = space.qkv.of<float>(tokens * (q_width_ + 2 * kv_width_));
    queries_ = space.queries.of<F>(tokens * q_width_);
    attended_ = space.attended.of<F>(tokens * q_width_);
    gated_ = space.gated.of<F>(tokens * model.mlp_width);
    hidden_ = space.hidden.of<F>(3 * step.num_entries * step.most_rank);
    scores_ = space.scores.of<float>(team.size() * MOST_HEADS * scores_room());
    if constexpr (IS_WHOLE) {
      const int64_t rows = std::max(tokens, step.num_wanted);
      whole_ = space.whole.of<int16_t>(
          rows * std::max(std::max(model.width, q_width_), model.mlp_width));
      row_scales_ = space.row_scales.of<float>(rows);
    }
  }

  void operator()(int thread) {
    int phase = 0;
    for (int64_t number = 0; number < model_.num_blocks; ++number) {
      block(thread, phase, number, model_.blocks[number]);
    }
    const Inputs<W> x = norm(phase, step_.num_wanted, step_.wanted, model_.final_gain,
                             model_.final_epsilon, model_.output);
    team_.share(phase, pieces(model_.vocab), [&](int64_t piece, int64_t next) {
      strips(step_.num_wanted, [&](int64_t first, int rows) {
        Tile tile;
        const W* ahead = next < 0 || first > 0 ? nullptr : row_of(model_.output, x.size, next);
        const int count =
            product(model_.output, x, first, rows, piece, model_.vocab, ahead, nullptr, tile);
        for (int m = 0; m < rows; ++m)
          std::memcpy(step_.logits + (first + m) * model_.vocab + piece * COLUMNS, tile.at[m],
                      count * sizeof(float));
      });
    });
  }

 private:
  static constexpr bool IS_WHOLE = std::is_same_v<W, int8_t>;

  void block(int thread, int& phase, int64_t number, const Block& block) {
    const int64_t tokens = step_.num_tokens, width = model_.width;
    const int64_t qkv_width = q_width_ + 2 * kv_width_;
    const Inputs<W> x =
        norm(phase, tokens, nullptr, block.gains[0], block.epsilons[0], block.linears[QUERY]);
    shrink(phase, number, QUERY, 3, normed_, width);
    const int64_t of_q = pieces(q_width_), of_kv = pieces(kv_width_);
    auto part = [&](int64_t piece) {  // which projection a piece is of, and which piece of it
      if (piece < of_q) return Part{QUERY, piece, 0, q_width_};
      if (piece < of_q + of_kv) return Part{KEY, piece - of_q, q_width_, kv_width_};
      return Part{VALUE, piece - of_q - of_kv, q_width_ + kv_width_, kv_width_};
    };
    team_.share(phase, of_q + 2 * of_kv, [&](int64_t piece, int64_t next) {
      const Part mine = part(piece);
      const W* ahead = row_of(block.linears[OUTPUT], q_width_, thread);
      Wishes wishes;
      if (next >= 0) {
        ahead = row_of(block.linears[part(next).which], width, part(next).piece);
        wish_tiles(wishes, number, part(next).which, part(next).piece);
      }
      wish_shrink(wishes, number, OUTPUT, 1, q_width_, piece, of_q + 2 * of_kv);
      strips(tokens, [&](int64_t first, int rows) {
        Tile tile;
        const int count = project(number, mine.which, QUERY, x, first, rows, mine.piece,
                                  mine.width, ahead, wishes, tile);
        for (int m = 0; m < rows; ++m)
          std::memcpy(qkv_ + (first + m) * qkv_width + mine.at + mine.piece * COLUMNS, tile.at[m],
                      count * sizeof(float));
      });
    });
    place(phase, number);
    attend_all(thread, phase, number);
    shrink(phase, number, OUTPUT, 1, attended_, q_width_);
    add(phase, number, OUTPUT, attended_, q_width_, row_of(block.linears[GATE], width, thread));
    const Inputs<W> y =
        norm(phase, tokens, nullptr, block.gains[1], block.epsilons[1], block.linears[GATE]);
    shrink(phase, number, GATE, 2, normed_, width);
    team_.share(phase, pieces(model_.mlp_width), [&](int64_t piece, int64_t next) {
      const W* up_rows = row_of(block.linears[UP], width, piece);
      const W* ahead = next < 0 ? row_of(block.linears[DOWN], model_.mlp_width, thread)
                                : row_of(block.linears[GATE], width, next);
      Wishes for_gate, for_up;
      wish_tiles(for_gate, number, UP, piece);
      if (next >= 0) wish_tiles(for_up, number, GATE, next);
      const int64_t halves = 2 * pieces(model_.mlp_width);
      wish_shrink(for_gate, number, DOWN, 1, model_.mlp_width, 2 * piece, halves);
      wish_shrink(for_up, number, DOWN, 1, model_.mlp_width, 2 * piece + 1, halves);
      strips(tokens, [&](int64_t first, int rows) {
        Tile gate, up;
        const int64_t out = model_.mlp_width;
        project(number, GATE, GATE, y, first, rows, piece, out, up_rows, for_gate, gate);
        const int count =
            project(number, UP, GATE, y, first, rows, piece, out, ahead, for_up, up);
        for (int m = 0; m < rows; ++m) {
          F* to = gated_ + (first + m) * out + piece * COLUMNS;
          for (int n = 0; n < count; n += LANES) {
            Floats value = activate(model_.activation, load_floats(gate.at[m] + n));
            store_floats(to + n, value * load_floats(up.at[m] + n));
          }
        }
      });
    });
    shrink(phase, number, DOWN, 1, gated_, model_.mlp_width);
    const bool is_last = number + 1 == model_.num_blocks;
    add(phase, number, DOWN, gated_, model_.mlp_width,
        row_of(is_last ? model_.output : (&block)[1].linears[QUERY], width, thread));
  }

  // Rows of x (all, or those of `rows`), normed, as `linear` reads them.
  Inputs<W> norm(int& phase, int64_t count, const int64_t* rows, const float* gain, double epsilon,
                 const Linear& linear) {
    const int64_t width = model_.width;
    team_.share(phase, count, [&](int64_t row, int64_t) {
      const float* x = step_.x + (rows == nullptr ? row : rows[row]) * width;
      F* to = normed_ + row * width;
      Floats power = {};
      for (int64_t i = 0; i < width; i += LANES) {
        Floats v = load_floats(x + i);
        power = power + v * v;
      }
      const float inverse = 1.0f / std::sqrt(sum(power) / float(width) + float(epsilon));
      for (int64_t i = 0; i < width; i += LANES)
        store_floats(to + i, load_floats(x + i) * inverse * load_floats(gain + i));
      if constexpr (IS_WHOLE) make_whole(row, to, width, linear);
    });
    if constexpr (IS_WHOLE) return {whole_, row_scales_, width};
    else return {normed_, nullptr, width};
  }

  // The rows of all tokens as `linear` reads them.
  Inputs<W> as_read(int& phase, const F* x, int64_t size, const Linear& linear) {
    if constexpr (IS_WHOLE) {
      team_.share(phase, step_.num_tokens,
                  [&](int64_t row, int64_t) { make_whole(row, x + row * size, size, linear); });
      return {whole_, row_scales_, size};
    } else {
      return {x, nullptr, size};
    }
  }

  void make_whole(int64_t row, const F* x, int64_t size, const Linear& linear) {
    row_scales_[row] = as_whole(x, linear.columns, size, whole_ + row * size);
  }

  // hidden = scale * weight * A x, for every entry and the pairs of `count` projections.
  void shrink(int& phase, int64_t number, int first, int count, const F* x, int64_t size) {
    if (step_.num_groups == 0) return;
    const int64_t parts = (step_.most_rank + RANKS - 1) / RANKS;
    auto rows_of = [&](int64_t piece) -> const T* {  // of A; null where the pair has fewer
      const Group& group = step_.groups[piece / (count * parts)];
      const Pair& pair = group.pairs[number * NUM_PROJECTIONS + first + piece / parts % count];
      const int64_t from = piece % parts * RANKS;
      return from < pair.rank ? static_cast<const T*>(pair.A) + from * size : nullptr;
    };
    team_.share(phase, step_.num_groups * count * parts, [&](int64_t piece, int64_t next) {
      const T* A = rows_of(piece);
      if (A == nullptr) return;
      const Group& group = step_.groups[piece / (count * parts)];
      const int which = int(piece / parts % count);
      const Pair& pair = group.pairs[number * NUM_PROJECTIONS + first + which];
      const int64_t from = piece % parts * RANKS;
      const int ranks = int(std::min<int64_t>(RANKS, pair.rank - from));
      const T* ahead = next < 0 ? nullptr : rows_of(next);
      for (int64_t begin = group.begin; begin < group.end; begin += STRIP) {
        const int rows = int(std::min<int64_t>(STRIP, group.end - begin));
        const F* read[STRIP] = {};
        alignas(64) float out[STRIP][RANKS];
        for (int m = 0; m < rows; ++m) read[m] = x + step_.entry_tokens[begin + m] * size;
        multiply(read, rows, Weights<T>{A, ahead, nullptr}, ranks, size, out[0], RANKS);
        for (int m = 0; m < rows; ++m) {
          const float scale = float(pair.scale) * step_.entry_weights[begin + m];
          F* to = hidden(which, begin + m) + from;
          for (int r = 0; r < ranks; ++r) to[r] = from_float<F>(out[m][r] * scale);
        }
      }
    });
  }

  // A projection's outputs of some rows with the pairs of all groups; gives how many there are.
  // group: the first projection that reads the same input.
  // ahead: the weights that the thread reads afterwards; wishes: what else.
  int project(int64_t number, int which, int group, const Inputs<W>& x, int64_t first, int rows,
              int64_t piece, int64_t out, const W* ahead, Wishes& wishes, Tile& tile) {
    const int count = product(model_.blocks[number].linears[which], x, first, rows, piece, out,
                              first == 0 ? ahead : nullptr, first == 0 ? &wishes : nullptr, tile);
    for (int64_t g = 0; g < step_.num_groups; ++g)
      add_pair(step_.groups[g], step_.groups[g].pairs[number * NUM_PROJECTIONS + which],
               which - group, first, rows, piece, tile);
    return count;
  }

  // The tiles of B that a piece of a projection needs.
  void wish_tiles(Wishes& wishes, int64_t number, int which, int64_t piece) const {
    for (int64_t g = 0; g < step_.num_groups; ++g) {
      const Pair& pair = step_.groups[g].pairs[number * NUM_PROJECTIONS + which];
      if (pair.rank == 0) continue;
      const T* tile = static_cast<const T*>(pair.B) + piece * COLUMNS * pair.rank;
      wishes.add(tile, COLUMNS * pair.rank * sizeof(T));
    }
  }

  // One of `parts` shares of what a later `shrink` reads.
  void wish_shrink(Wishes& wishes, int64_t number, int first, int count, int64_t size,
                   int64_t part, int64_t parts) const {
    if (number == model_.num_blocks) return;
    for (int64_t g = 0; g < step_.num_groups; ++g) {
      for (int which = first; which < first + count; ++which) {
        const Pair& pair = step_.groups[g].pairs[number * NUM_PROJECTIONS + which];
        const int64_t bytes = pair.rank * size * sizeof(T), from = bytes * part / parts;
        if (pair.rank != 0)
          wishes.add(static_cast<const char*>(pair.A) + from, bytes * (part + 1) / parts - from);
      }
    }
  }

  int product(const Linear& linear, const Inputs<W>& x, int64_t first, int rows, int64_t piece,
              int64_t out, const W* ahead, Wishes* wishes, Tile& tile) {
    const Factor<W>* read[STRIP] = {};
    for (int m = 0; m < rows; ++m) read[m] = x.at + (first + m) * x.size;
    const int64_t at = piece * COLUMNS;
    const int count = int(std::min<int64_t>(COLUMNS, out - at));
    const Weights<W> weights{row_of(linear, x.size, piece), ahead, wishes};
    multiply(read, rows, weights, count, x.size, tile.at[0], COLUMNS);
    if constexpr (IS_WHOLE)
      for (int m = 0; m < rows; ++m)
        for (int n = 0; n < count; ++n)
          tile.at[m][n] *= x.scales[first + m] * linear.rows[at + n];
    if (linear.bias != nullptr)
      for (int m = 0; m < rows; ++m)
        for (int n = 0; n < count; ++n)
          tile.at[m][n] += to_float(static_cast<const T*>(linear.bias)[at + n]);
    return count;
  }

  static const W* row_of(const Linear& linear, int64_t size, int64_t piece) {
    return static_cast<const W*>(linear.weight) + piece * COLUMNS * size;
  }

  void add_pair(const Group& group, const Pair& pair, int which, int64_t first, int rows,
                int64_t piece, Tile& tile) {
    if (pair.rank == 0) return;
    const int64_t* tokens = step_.entry_tokens;
    const int64_t* at = tokens + group.begin;
    if (first > 0) at = std::lower_bound(at, tokens + group.end, first);
    const T* B = static_cast<const T*>(pair.B) + piece * COLUMNS * pair.rank;
    while (at < tokens + group.end && *at < first + rows) {
      float(*to[EXPANDED])[COLUMNS];
      const F* read[EXPANDED];
      int taken = 0;
      for (; taken < EXPANDED && at < tokens + group.end && *at < first + rows; ++at, ++taken) {
        to[taken] = &tile.at[*at - first];
        read[taken] = hidden(which, at - tokens);
      }
      expand<T>(to, read, taken, B, pair.rank);
    }
  }

  // x += the projection's outputs. then: weights that the thread reads next.
  void add(int& phase, int64_t number, int which, const F* input, int64_t size, const W* then) {
    const int64_t width = model_.width;
    const Linear& linear = model_.blocks[number].linears[which];
    const Inputs<W> y = as_read(phase, input, size, linear);
    team_.share(phase, pieces(width), [&](int64_t piece, int64_t next) {
      const W* ahead = next < 0 ? then : row_of(linear, size, next);
      Wishes wishes;
      if (next >= 0) wish_tiles(wishes, number, which, next);
      if (which == OUTPUT) wish_shrink(wishes, number, GATE, 2, width, piece, pieces(width));
      else wish_shrink(wishes, number + 1, QUERY, 3, width, piece, pieces(width));
      strips(step_.num_tokens, [&](int64_t first, int rows) {
        Tile tile;
        const int count = project(number, which, which, y, first, rows, piece, width, ahead,
                                  wishes, tile);
        for (int m = 0; m < rows; ++m) {
          float* x = step_.x + (first + m) * width + piece * COLUMNS;
          for (int n = 0; n < count; n += LANES)
            store_floats(x + n, load_floats(x + n) + load_floats(tile.at[m] + n));
        }
      });
    });
  }

  // Turns queries and keys to their positions; keys and values go to their slots.
  void place(int& phase, int64_t number) {
    const int64_t size = model_.head_size;
    team_.share(phase, step_.num_tokens, [&](int64_t token, int64_t) {
      const float* from = qkv_ + token * (q_width_ + 2 * kv_width_);
      const int64_t position = step_.positions[token];
      const float* cos = model_.cos + position * size;
      const float* sin = model_.sin + position * size;
      for (int64_t head = 0; head < model_.num_heads; ++head)
        rotate(from + head * size, size, cos, sin, queries_ + token * q_width_ + head * size);
      for (int64_t head = 0; head < model_.num_kv_heads; ++head) {
        const int64_t at = place_of(number, token, head) + position * size;
        rotate(from + q_width_ + head * size, size, cos, sin, keys() + at);
        const float* value = from + q_width_ + kv_width_ + head * size;
        for (int64_t i = 0; i < size; i += LANES)
          store_floats(values() + at + i, load_floats(value + i));
      }
    });
  }

  void attend_all(int thread, int& phase, int64_t number) {
    const int64_t size = model_.head_size, heads = model_.num_heads / model_.num_kv_heads;
    float* scores = scores_ + thread * MOST_HEADS * scores_room();
    team_.share(phase, step_.num_tokens * model_.num_kv_heads, [&](int64_t piece, int64_t next) {
      const int64_t token = piece / model_.num_kv_heads, kv_head = piece % model_.num_kv_heads;
      const int64_t at = place_of(number, token, kv_head);
      if (next >= 0) {  // short texts: nothing but this hides where they lie
        const int64_t its = place_of(number, next / model_.num_kv_heads, next % model_.num_kv_heads);
        const int64_t count = step_.positions[next / model_.num_kv_heads] + 1;
        const int64_t lines = std::min<int64_t>(count * size * sizeof(T) / LINE, 128);
        ask(reinterpret_cast<const char*>(keys() + its), lines);
        ask(reinterpret_cast<const char*>(values() + its), lines);
      }
      const int64_t mine = token * q_width_ + kv_head * heads * size;
      attend<T>(heads, queries_ + mine, keys() + at, values() + at, step_.positions[token] + 1,
                size, scores, scores_room(), attended_ + mine);
    });
  }

  template <class Work>
  static void strips(int64_t rows, Work work) {
    for (int64_t first = 0; first < rows; first += STRIP)
      work(first, int(std::min<int64_t>(STRIP, rows - first)));
  }

  static int64_t pieces(int64_t out) { return (out + COLUMNS - 1) / COLUMNS; }
  int64_t scores_room() const { return padded(model_.max_tokens + 2 * LANES, LANES); }
  F* hidden(int which, int64_t entry) {
    return hidden_ + (which * step_.num_entries + entry) * step_.most_rank;
  }
  int64_t place_of(int64_t number, int64_t token, int64_t kv_head) const {
    const int64_t slot = number * model_.num_slots + step_.slots[token];
    return (slot * model_.num_kv_heads + kv_head) * model_.max_tokens * model_.head_size;
  }
  T* keys() { return static_cast<T*>(model_.keys); }
  T* values() { return static_cast<T*>(model_.values); }

  const Model& model_;
  const Step& step_;
  Team& team_;
  int64_t q_width_, kv_width_;
  F *normed_, *queries_, *attended_, *gated_, *hidden_;
  float *qkv_, *scores_, *row_scales_ = nullptr;
  int16_t* whole_ = nullptr;
};

}  // namespace loralab
