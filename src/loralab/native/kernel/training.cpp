// The parts of a training step that are no large matrix product, for rows of fp32 or bf16 numbers.
// Threads are OpenMP's, from the library that torch has loaded, so that both share one team.
#include <omp.h>

#include "attention.h"
#include "convolution.h"
#include "elementwise.h"
#include "low_rank.h"

using namespace loralab;

#define FOR_DTYPE(T, NAME)                                                                         \
  extern "C" void low_rank_forward_##NAME(const LowRank* step) { low_rank_forward<T>(*step); }     \
  extern "C" void low_rank_backward_##NAME(const LowRank* step) { low_rank_backward<T>(*step); }   \
  extern "C" void attention_forward_##NAME(const Attention* a) { attention<T>(*a, false); }        \
  extern "C" void attention_backward_##NAME(const Attention* a) { attention<T>(*a, true); }        \
  extern "C" void gated_forward_##NAME(int64_t count, int64_t kind, int64_t num_threads,           \
                                       const void* gate, const void* up, void* gated) {            \
    gated_forward<T>(count, kind, num_threads, (const T*)gate, (const T*)up, (T*)gated);           \
  }                                                                                                \
  extern "C" void gated_backward_##NAME(int64_t count, int64_t kind, int64_t num_threads,          \
                                        const void* g, const void* gate, const void* up,           \
                                        void* grad_gate, void* grad_up) {                          \
    gated_backward<T>(count, kind, num_threads, (const T*)g, (const T*)gate, (const T*)up,         \
                      (T*)grad_gate, (T*)grad_up);                                                 \
  }                                                                                                \
  extern "C" void norm_forward_##NAME(int64_t rows, int64_t width, float epsilon,                  \
                                      int64_t num_threads, const void* x, const void* gain,        \
                                      void* n, void* inverse) {                                    \
    norm_forward<T>(rows, width, epsilon, num_threads, (const T*)x, (const T*)gain, (T*)n,         \
                    (float*)inverse);                                                              \
  }                                                                                                \
  extern "C" void norm_backward_##NAME(int64_t rows, int64_t width, int64_t num_threads,           \
                                       const void* g, const void* x, const void* inverse,          \
                                       const void* gain, const void* beside, void* grad_x) {       \
    norm_backward<T>(rows, width, num_threads, (const T*)g, (const T*)x, (const float*)inverse,    \
                     (const T*)gain, (const T*)beside, (T*)grad_x);                                \
  }

FOR_DTYPE(float, fp32)
FOR_DTYPE(bf16, bf16)

extern "C" void pair_gradients_fp32(const Convolution* convolution) { pair_gradients(*convolution); }
extern "C" void merge_pair_fp32(int64_t out, int64_t lines, int64_t rank, float scale, int64_t num_threads,
                                const float* W, const float* A, const float* B, float* merged) {
  merge_pair(out, lines, rank, scale, num_threads, W, A, B, merged);
}
