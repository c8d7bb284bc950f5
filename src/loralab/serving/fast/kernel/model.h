// What a step is told: the model, the adapters in use, the tokens (structures.py has the same).
#pragma once

#include "pairs.h"

namespace loralab {

enum Projection { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN, NUM_PROJECTIONS };

struct Linear {
  const void* weight;    // (out, in)
  const void* bias;      // null where there is none
  const float* rows;     // int8 weights only: weight[n][k] times rows[n] * columns[k] is meant
  const float* columns;  // the same for all that read one input
};

struct Block {
  Linear linears[NUM_PROJECTIONS];
  const float* gains[2];
  double epsilons[2];
};

struct Model {
  int64_t num_blocks, width, num_heads, num_kv_heads, head_size, mlp_width, vocab;
  int64_t num_slots, max_tokens, activation;
  const Block* blocks;
  const float* final_gain;
  double final_epsilon;
  Linear output;
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

}  // namespace loralab
