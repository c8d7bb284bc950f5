// Norms and gated activations, forward and backward, each in one pass over rows.
#pragma once

#include "low_rank.h"

namespace loralab {

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

struct Curve {  // an activation and its slope
  Vector value, slope;
};

inline Curve curve(int64_t kind, Vector x) {
  if (kind == SILU) {
    Vector s = 1.0f / (1.0f + exponential(-x));
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
  if (kind == GELU_TANH) {  // 0.5 (1 + tanh u) is the logistic function of 2 u
    Vector u = 0.7978845608f * (x + 0.044715f * x * x * x);
    Vector s = 1.0f / (1.0f + exponential(-2.0f * u));
    Vector du = 0.7978845608f * (1.0f + 0.134145f * x * x);
    return {x * s, s + 2.0f * x * s * (1.0f - s) * du};
  }
  Vector below = x;
  for (int i = 0; i < WIDTH; ++i) below[i] = 0.5f + 0.5f * std::erf(x[i] * 0.70710678f);
  return {x * below, below + x * 0.3989422804f * exponential(-0.5f * x * x)};
}

template <class T>
void gated_forward(int64_t count, int64_t kind, int64_t num_threads, const T* gate, const T* up, T* gated) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t j = 0; j < count; j += WIDTH)
    store(gated + j, curve(kind, load(gate + j)).value * load(up + j));
}

// From the gradient of `gated`: those of gate (which may be the memory of g) and up.
template <class T>
void gated_backward(int64_t count, int64_t kind, int64_t num_threads, const T* g, const T* gate,
                    const T* up, T* grad_gate, T* grad_up) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t j = 0; j < count; j += WIDTH) {
    Vector gradient = load(g + j), u = load(up + j);
    Curve c = curve(kind, load(gate + j));
    store(grad_gate + j, gradient * u * c.slope);
    store(grad_up + j, gradient * c.value);
  }
}

// n = gain * x / sqrt(mean(x^2) + epsilon); `inverse` is that root's reciprocal of each row.
template <class T>
void norm_forward(int64_t rows, int64_t width, float epsilon, int64_t num_threads, const T* x,
                  const T* gain, T* n, float* inverse) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = x + i * width;
    Vector squares = {};
    for (int64_t j = 0; j < width; j += WIDTH) squares += load(from + j) * load(from + j);
    float scale = 1.0f / std::sqrt(total(squares) / width + epsilon);
    inverse[i] = scale;
    for (int64_t j = 0; j < width; j += WIDTH)
      store(n + i * width + j, load(from + j) * scale * load(gain + j));
  }
}

// The gradient of x, plus `beside` where it is given (which may be the memory of grad_x).
template <class T>
void norm_backward(int64_t rows, int64_t width, int64_t num_threads, const T* g, const T* x,
                   const float* inverse, const T* gain, const T* beside, T* grad_x) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * width;
    Vector along = {};
    for (int64_t j = 0; j < width; j += WIDTH)
      along += load(g + at + j) * load(gain + j) * load(x + at + j);
    const float scale = inverse[i], share = total(along) * scale * scale / width;
    for (int64_t j = 0; j < width; j += WIDTH) {
      Vector value = (load(g + at + j) * load(gain + j) - load(x + at + j) * share) * scale;
      if (beside) value += load(beside + at + j);
      store(grad_x + at + j, value);
    }
  }
}

}  // namespace loralab
