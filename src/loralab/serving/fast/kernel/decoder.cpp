// A decoding step: flat tokens of many sequences, each with its own adapters, through all blocks.
//
//   n = norm(x)    a = attention(rotary(Q n), rotary(K n), V n)    x = x + O a
//   m = norm(x)    x = x + Down(act(Gate m) * Up m)                logits = Output norm(x)
//
// x and all sums are fp32; what a product reads is T, the type of the weights.

#include <cstddef>

#include "attention.h"
#include "packing.h"
#include "pool.h"
#include "products.h"

namespace loralab {

constexpr int RANKS = 16;  // rows of A in one piece of work

enum Projection { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN, NUM_PROJECTIONS };

struct Block {
  const void* weights[NUM_PROJECTIONS];  // (out, in), the model's own
  const void* biases[NUM_PROJECTIONS];   // null where there is none
  const float* gains[2];
  double epsilons[2];
};

struct Model {
  int64_t num_blocks, width, num_heads, num_kv_heads, head_size, mlp_width, vocab;
  int64_t num_slots, max_tokens, activation;
  const Block* blocks;
  const float* final_gain;
  double final_epsilon;
  const void* output;
  const void* output_bias;
  const float* cos;  // (max_tokens, head_size)
  const float* sin;
  void* keys;  // (blocks, slots, kv heads, max_tokens, head_size)
  void* values;
};

// The entries begin ... end - 1 use the adapter with these pairs (blocks x projections).
struct Group {
  const Pair* pairs;
  int64_t begin, end;
};

struct Step {
  int64_t num_tokens, num_wanted, num_groups, num_entries, most_rank;
  const int64_t* positions;  // of each token
  const int64_t* slots;
  const int64_t* wanted;  // tokens whose logits are read
  const Group* groups;
  const int64_t* entry_tokens;  // ascending inside a group
  const float* entry_weights;
  float* x;       // (tokens, width): the embedding; overwritten
  float* logits;  // (wanted, vocab)
};

// A piece of one of several projections; at: where the projection's outputs start.
struct Part {
  int which;
  int64_t piece, at, width;
};

struct Room {
  std::unique_ptr<char[]> bytes;
  size_t size = 0;

  template <class T>
  T* of(size_t count) {
    size_t needed = count * sizeof(T) + 128;
    if (needed > size) {
      bytes.reset(new char[needed]);
      size = needed;
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.get()) + 63) & ~uintptr_t(63));
  }
};

// What lives between the phases; kept from step to step.
struct Workspace {
  Room normed, qkv, queries, attended, gated, hidden, scores;
};

template <class T>
class Run {
 public:
  Run(const Model& model, const Step& step, Team& team, Workspace& space)
      : model_(model), step_(step), team_(team) {
    const int64_t tokens = step.num_tokens;
    q_width_ = model.num_heads * model.head_size;
    kv_width_ = model.num_kv_heads * model.head_size;
    normed_ = space.normed.of<T>(std::max(tokens, step.num_wanted) * model.width);
    qkv_ = space.qkv.of<float>(tokens * (q_width_ + 2 * kv_width_));
    queries_ = space.queries.of<T>(tokens * q_width_);
    attended_ = space.attended.of<T>(tokens * q_width_);
    gated_ = space.gated.of<T>(tokens * model.mlp_width);
    hidden_ = space.hidden.of<T>(3 * step.num_entries * step.most_rank);
    scores_ = space.scores.of<float>(team.size() * MOST_HEADS * scores_room());
  }

  void operator()(int thread) {
    int phase = 0;
    for (int64_t number = 0; number < model_.num_blocks; ++number) {
      block(thread, phase, number, model_.blocks[number]);
    }
    norm(phase, step_.num_wanted, step_.wanted, model_.final_gain, model_.final_epsilon);
    const T* weight = static_cast<const T*>(model_.output);
    const T* bias = static_cast<const T*>(model_.output_bias);
    team_.share(phase, pieces(model_.vocab), [&](int64_t piece, int64_t next) {
      strips(step_.num_wanted, [&](int64_t first, int rows) {
        Tile tile;
        const T* ahead = next < 0 || first > 0 ? nullptr : weight + next * COLUMNS * model_.width;
        const Weights<T> rows_of{weight + piece * COLUMNS * model_.width, ahead, nullptr};
        const int count = product(normed_, model_.width, first, rows, rows_of, bias, piece,
                                  model_.vocab, tile);
        for (int m = 0; m < rows; ++m)
          std::memcpy(step_.logits + (first + m) * model_.vocab + piece * COLUMNS, tile.at[m],
                      count * sizeof(float));
      });
    });
  }

 private:
  void block(int thread, int& phase, int64_t number, const Block& block) {
    const int64_t tokens = step_.num_tokens, width = model_.width;
    const int64_t qkv_width = q_width_ + 2 * kv_width_;
    norm(phase, tokens, nullptr, block.gains[0], block.epsilons[0]);
    shrink(phase, number, QUERY, 3, normed_, width);
    const int64_t of_q = pieces(q_width_), of_kv = pieces(kv_width_);
    auto part = [&](int64_t piece) {  // which projection a piece is of, and which piece of it
      if (piece < of_q) return Part{QUERY, piece, 0, q_width_};
      if (piece < of_q + of_kv) return Part{KEY, piece - of_q, q_width_, kv_width_};
      return Part{VALUE, piece - of_q - of_kv, q_width_ + kv_width_, kv_width_};
    };
    team_.share(phase, of_q + 2 * of_kv, [&](int64_t piece, int64_t next) {
      const Part mine = part(piece);
      const T* ahead = nullptr;
      Wishes wishes;
      if (next >= 0) {
        ahead = row_of(number, part(next).which, width, part(next).piece);
        wish_tiles(wishes, number, part(next).which, part(next).piece);
      }
      wish_shrink(wishes, number, OUTPUT, 1, q_width_, piece, of_q + 2 * of_kv);
      strips(tokens, [&](int64_t first, int rows) {
        Tile tile;
        const int count = project(number, mine.which, QUERY, normed_, width, first, rows,
                                  mine.piece, mine.width, ahead, wishes, tile);
        for (int m = 0; m < rows; ++m)
          std::memcpy(qkv_ + (first + m) * qkv_width + mine.at + mine.piece * COLUMNS, tile.at[m],
                      count * sizeof(float));
      });
    });
    place(phase, number);
    attend_all(thread, phase, number);
    shrink(phase, number, OUTPUT, 1, attended_, q_width_);
    add(phase, number, OUTPUT, attended_, q_width_);
    norm(phase, tokens, nullptr, block.gains[1], block.epsilons[1]);
    shrink(phase, number, GATE, 2, normed_, width);
    team_.share(phase, pieces(model_.mlp_width), [&](int64_t piece, int64_t next) {
      const T* up_rows = row_of(number, UP, width, piece);
      const T* ahead = next < 0 ? nullptr : row_of(number, GATE, width, next);
      Wishes for_gate, for_up;
      wish_tiles(for_gate, number, UP, piece);
      if (next >= 0) wish_tiles(for_up, number, GATE, next);
      const int64_t halves = 2 * pieces(model_.mlp_width);
      wish_shrink(for_gate, number, DOWN, 1, model_.mlp_width, 2 * piece, halves);
      wish_shrink(for_up, number, DOWN, 1, model_.mlp_width, 2 * piece + 1, halves);
      strips(tokens, [&](int64_t first, int rows) {
        Tile gate, up;
        const int64_t out = model_.mlp_width;
        project(number, GATE, GATE, normed_, width, first, rows, piece, out, up_rows,
                for_gate, gate);
        const int count = project(number, UP, GATE, normed_, width, first, rows, piece, out, ahead,
                                  for_up, up);
        for (int m = 0; m < rows; ++m) {
          T* to = gated_ + (first + m) * out + piece * COLUMNS;
          for (int n = 0; n < count; n += LANES) {
            Floats value = activate(model_.activation, load_floats(gate.at[m] + n));
            store_floats(to + n, value * load_floats(up.at[m] + n));
          }
        }
      });
    });
    shrink(phase, number, DOWN, 1, gated_, model_.mlp_width);
    add(phase, number, DOWN, gated_, model_.mlp_width);
  }

  // Rows of x (all, or those of `rows`) as the next product reads them.
  void norm(int& phase, int64_t count, const int64_t* rows, const float* gain, double epsilon) {
    const int64_t width = model_.width;
    team_.share(phase, count, [&](int64_t row, int64_t) {
      const float* x = step_.x + (rows == nullptr ? row : rows[row]) * width;
      Floats power = {};
      for (int64_t i = 0; i < width; i += LANES) {
        Floats v = load_floats(x + i);
        power = power + v * v;
      }
      const float inverse = 1.0f / std::sqrt(sum(power) / float(width) + float(epsilon));
      for (int64_t i = 0; i < width; i += LANES)
        store_floats(normed_ + row * width + i,
                     load_floats(x + i) * inverse * load_floats(gain + i));
    });
  }

  // hidden = scale * weight * A x, for every entry and the pairs of `count` projections.
  void shrink(int& phase, int64_t number, int first, int count, const T* x, int64_t size) {
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
        const T* read[STRIP] = {};
        alignas(64) float out[STRIP][RANKS];
        for (int m = 0; m < rows; ++m) read[m] = x + step_.entry_tokens[begin + m] * size;
        multiply(read, rows, Weights<T>{A, ahead, nullptr}, ranks, size, out[0], RANKS);
        for (int m = 0; m < rows; ++m) {
          const float scale = float(pair.scale) * step_.entry_weights[begin + m];
          T* to = hidden(which, begin + m) + from;
          for (int r = 0; r < ranks; ++r) to[r] = from_float<T>(out[m][r] * scale);
        }
      }
    });
  }

  // A projection's outputs of some rows with the pairs of all groups; gives how many there are.
  // group: the first projection that reads the same input.
  // ahead: the weights that the thread reads afterwards; wishes: what else.
  int project(int64_t number, int which, int group, const T* x, int64_t size, int64_t first,
              int rows, int64_t piece, int64_t out, const T* ahead, Wishes& wishes,
              Tile& tile) {
    const Block& block = model_.blocks[number];
    const Weights<T> weights{row_of(number, which, size, piece), first == 0 ? ahead : nullptr,
                             first == 0 ? &wishes : nullptr};
    const int count = product(x, size, first, rows, weights,
                              static_cast<const T*>(block.biases[which]), piece, out, tile);
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

  int product(const T* x, int64_t size, int64_t first, int rows, Weights<T> weights, const T* bias,
              int64_t piece, int64_t out, Tile& tile) {
    const T* read[STRIP] = {};
    for (int m = 0; m < rows; ++m) read[m] = x + (first + m) * size;
    const int64_t at = piece * COLUMNS;
    const int count = int(std::min<int64_t>(COLUMNS, out - at));
    multiply(read, rows, weights, count, size, tile.at[0], COLUMNS);
    if (bias != nullptr)
      for (int m = 0; m < rows; ++m)
        for (int n = 0; n < count; ++n) tile.at[m][n] += to_float(bias[at + n]);
    return count;
  }

  const T* row_of(int64_t number, int which, int64_t size, int64_t piece) const {
    return static_cast<const T*>(model_.blocks[number].weights[which]) + piece * COLUMNS * size;
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
      const T* read[EXPANDED];
      int taken = 0;
      for (; taken < EXPANDED && at < tokens + group.end && *at < first + rows; ++at, ++taken) {
        to[taken] = &tile.at[*at - first];
        read[taken] = hidden(which, at - tokens);
      }
      expand(to, read, taken, B, pair.rank);
    }
  }

  // x += the projection's outputs.
  void add(int& phase, int64_t number, int which, const T* input, int64_t size) {
    const int64_t width = model_.width;
    team_.share(phase, pieces(width), [&](int64_t piece, int64_t next) {
      const T* ahead = next < 0 ? nullptr : row_of(number, which, size, next);
      Wishes wishes;
      if (next >= 0) wish_tiles(wishes, number, which, next);
      if (which == OUTPUT) wish_shrink(wishes, number, GATE, 2, width, piece, pieces(width));
      else wish_shrink(wishes, number + 1, QUERY, 3, width, piece, pieces(width));
      strips(step_.num_tokens, [&](int64_t first, int rows) {
        Tile tile;
        const int count = project(number, which, which, input, size, first, rows,
                                  piece, width, ahead, wishes, tile);
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
      attend(heads, queries_ + mine, keys() + at, values() + at, step_.positions[token] + 1, size,
             scores, scores_room(), attended_ + mine);
    });
  }

  template <class Work>
  static void strips(int64_t rows, Work work) {
    for (int64_t first = 0; first < rows; first += STRIP)
      work(first, int(std::min<int64_t>(STRIP, rows - first)));
  }

  static int64_t pieces(int64_t out) { return (out + COLUMNS - 1) / COLUMNS; }
  int64_t scores_room() const { return padded(model_.max_tokens + 2 * LANES, LANES); }
  T* hidden(int which, int64_t entry) {
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
  T *normed_, *queries_, *attended_, *gated_, *hidden_;
  float *qkv_, *scores_;
};

// One step at a time in a process: steps share the team and the workspace.
std::mutex& turn() {
  static std::mutex mutex;
  return mutex;
}

template <class T>
void run(const Model* model, const Step* step, int threads) {
  static Workspace space;
  std::lock_guard<std::mutex> lock(turn());
  Team& team = team_of(threads);
  Run<T> job(*model, *step, team, space);
  team.run([&](int thread) { job(thread); });
}

// On the caller's thread alone, so that it may go on beside a step.
template <class T>
void pack_all(const Packing* jobs, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pack<T>(jobs[i]);
}

}  // namespace loralab

extern "C" {
void loralab_run_fp32(const loralab::Model* m, const loralab::Step* s, int n) {
  loralab::run<float>(m, s, n);
}
void loralab_run_bf16(const loralab::Model* m, const loralab::Step* s, int n) {
  loralab::run<loralab::bf16>(m, s, n);
}
void loralab_pack_fp32(const loralab::Packing* jobs, int64_t count) {
  loralab::pack_all<float>(jobs, count);
}
void loralab_pack_bf16(const loralab::Packing* jobs, int64_t count) {
  loralab::pack_all<loralab::bf16>(jobs, count);
}
// The sizes of the structures, so that the caller can see that it means the same ones.
int64_t loralab_sizes() {
  return sizeof(loralab::Model) + 1000 * sizeof(loralab::Block) + 1000000 * sizeof(loralab::Step) +
         1000000000ll * sizeof(loralab::Group);
}
}
