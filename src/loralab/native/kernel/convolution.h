// The gradients of a pair whose A convolves, y += s B (A * x): both thin convolutions in one walk over
// the input. A band of an image at a time is laid out as a matrix, a row for each channel and place of
// the kernel, that stays in a core's cache for both.
#pragma once

#include "low_rank.h"

namespace loralab {

struct Convolution {  // in two dimensions; one of a single dimension has a height of 1
  int64_t batch, channels, height, width, out, out_height, out_width, rank;
  int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x;
  int64_t dilation_y, dilation_x, num_threads;
  float scale;
  const float* x;  // (batch, channels, height, width)
  const float* g;  // (batch, out, out_height, out_width): the output's gradient
  const float* A;  // (rank, channels * kernel_height * kernel_width)
  const float* B;  // (out, rank)
  float* grad_A;
  float* grad_B;

  int64_t kernel_size() const { return kernel_height * kernel_width; }
};

constexpr int64_t BAND_PLACES = 64, CACHED = 12 << 10;  // numbers of a matrix that stays in the cache

// Some rows of an image's output, or several small images, with the rows of the input that these read.
struct Band {
  int64_t image, images, top, rows, places, first, input_rows;
};

// Bands of a batch: images is above 1 only where rows is the whole height.
struct Bands {
  int64_t rows, images, an_image, count, places;

  explicit Bands(const Convolution& c) {
    rows = std::clamp<int64_t>(BAND_PLACES / c.out_width, 1, c.out_height);
    images = std::clamp<int64_t>(BAND_PLACES / (c.out_width * c.out_height), 1, c.batch);
    an_image = (c.out_height + rows - 1) / rows;
    count = (c.batch + images - 1) / images * an_image;
    places = images * rows * c.out_width;
  }

  int64_t input_rows(const Convolution& c, int64_t of) const {
    return (of - 1) * c.stride_y + (c.kernel_height - 1) * c.dilation_y + 1;
  }

  Band at(const Convolution& c, int64_t number) const {
    const int64_t image = number / an_image * images, top = number % an_image * rows;
    const int64_t own_images = std::min(images, c.batch - image), own = std::min(rows, c.out_height - top);
    return {image, own_images, top, own, own_images * own * c.out_width, top * c.stride_y - c.padding_y,
            input_rows(c, own)};
  }
};

// Length of an input's row with its padding, as far as the kernel reaches.
inline int64_t padded_width(const Convolution& c) {
  return std::max(c.padding_x + c.width, (c.out_width - 1) * c.stride_x + (c.kernel_width - 1) * c.dilation_x + 1);
}

// Zeros in whole vectors, up to WIDTH - 1 more than asked for.
inline void clear(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) store(to + i, Vector{});
}

// A row of the input between zeros. Whole vectors are read where the input goes on that far, and written
// beyond the row's end, over what the next row writes.
inline void pad_row(const float* line, const float* end, int64_t width, int64_t before, int64_t pitch, float* to) {
  clear(to, before);
  int64_t x = 0;
  for (; x < width && line + x + WIDTH <= end; x += WIDTH) store(to + before + x, load(line + x));
  for (; x < width; ++x) to[before + x] = line[x];
  clear(to + before + width, pitch - before - width);
}

// The band's input of some channels with zeros around: (channels, images, rows, padded width).
inline void pad(const Convolution& c, const Band& band, int64_t from, int64_t until, float* to) {
  const int64_t pitch = padded_width(c), size = c.height * c.width;
  const float* end = c.x + c.batch * c.channels * size;
  const int64_t above = std::clamp<int64_t>(-band.first, 0, band.input_rows);
  const int64_t inside = std::clamp<int64_t>(c.height - band.first, above, band.input_rows) - above;
  const int64_t below = band.input_rows - above - inside;
  for (int64_t channel = from; channel < until; ++channel)
    for (int64_t image = band.image; image < band.image + band.images; ++image) {
      const float* line = c.x + (image * c.channels + channel) * size + (band.first + above) * c.width;
      clear(to, above * pitch);
      to += above * pitch;
      for (int64_t row = 0; row < inside; ++row, line += c.width, to += pitch)
        pad_row(line, end, c.width, c.padding_x, pitch, to);
      clear(to, below * pitch);
      to += below * pitch;
    }
}

// Rows of `length`, some way apart, one after another; each is written beyond its end, too.
inline float* gather(const float* line, int64_t rows, int64_t apart, int64_t length, float* to) {
  if (length <= WIDTH) {
#pragma GCC unroll 4
    for (int64_t row = 0; row < rows; ++row, line += apart, to += length) store(to, load(line));
    return to;
  }
  for (int64_t row = 0; row < rows; ++row, line += apart, to += length)
    for (int64_t x = 0; x < length; x += WIDTH) store(to + x, load(line + x));
  return to;
}

// What each place of the kernel meets at each place of the band: (channels * kernel, places).
inline void lay_out(const Convolution& c, const Band& band, int64_t channels, const float* input, float* to) {
  const int64_t pitch = padded_width(c), size = band.input_rows * pitch;
  for (int64_t channel = 0; channel < channels; ++channel, input += band.images * size)
    for (int64_t ky = 0; ky < c.kernel_height; ++ky)
      for (int64_t kx = 0; kx < c.kernel_width; ++kx)
        for (int64_t image = 0; image < band.images; ++image) {
          const float* line = input + image * size + ky * c.dilation_y * pitch + kx * c.dilation_x;
          if (c.stride_x == 1) {
            to = gather(line, band.rows, c.stride_y * pitch, c.out_width, to);
            continue;
          }
          for (int64_t row = 0; row < band.rows; ++row, line += c.stride_y * pitch)
            for (int64_t x = 0; x < c.out_width; ++x) *to++ = line[x * c.stride_x];
        }
}

// The band's gradient: (out, places), set apart from each other's cache lines.
inline Left band_of_gradient(const Convolution& c, const Band& band, Scratch& scratch) {
  const int64_t size = c.out_height * c.out_width, apart = band.places + COLUMNS;
  const int64_t own = band.rows * c.out_width;
  float* to = sized(scratch, c.out * apart);
  for (int64_t o = 0; o < c.out; ++o)
    for (int64_t i = 0; i < band.images; ++i)
      std::memcpy(to + o * apart + i * own, c.g + ((band.image + i) * c.out + o) * size + band.top * c.out_width,
                  own * sizeof(float));
  return {to, apart};
}

// PARTS_OF_RANK vectors hold the columns of a tile: one is enough for small ranks.
template <int PARTS_OF_RANK>
void pair_gradients(const Convolution& c) {
  const int64_t lines = c.channels * c.kernel_size(), step = PARTS_OF_RANK * WIDTH;
  const int64_t width = (c.rank + step - 1) / step * step;
  const Bands bands(c);
  const int64_t channels = std::clamp<int64_t>(CACHED / (c.kernel_size() * bands.places), 1, c.channels);
  const int64_t size_A = lines * width, size_B = c.out * width;
  static thread_local Scratch turned_A, wide_B, sums;  // the calling thread's, which all use
  float* A = sized(turned_A, size_A);
  float* B = sized(wide_B, size_B);
  float* all_sums = sized(sums, c.num_threads * (size_A + size_B));

#pragma omp parallel num_threads(c.num_threads)
  {
    static thread_local Scratch input, matrix, hidden, grad_hidden, gradient;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Range own = share(lines, thread, threads);
    turn(c.A, c.rank, lines, A, own.from, own.until, width);
    own = share(c.out, thread, threads);
    for (int64_t o = own.from; o < own.until; ++o)
      for (int64_t r = 0; r < width; ++r) B[o * width + r] = r < c.rank ? c.scale * c.B[o * c.rank + r] : 0;
    float* sums_A = all_sums + thread * (size_A + size_B);
    float* sums_B = sums_A + size_A;
    std::fill(sums_A, sums_B + size_B, 0.0f);
    const int64_t input_size = bands.images * bands.input_rows(c, bands.rows) * padded_width(c);
    float* around = sized(input, channels * input_size + WIDTH);
    float* X = sized(matrix, channels * c.kernel_size() * bands.places + WIDTH);
    float* h = sized(hidden, bands.places * width);
    float* gh = sized(grad_hidden, bands.places * width);
#pragma omp barrier
    own = share(bands.count, thread, threads);
    for (int64_t task = own.from; task < own.until; ++task) {
      const Band band = bands.at(c, task);
      Left g = band_of_gradient(c, band, gradient);
      multiply<PARTS_OF_RANK>(band.places, width, c.out, {g.at, 1, g.row}, {B, width}, gh, width, false);
      for (int64_t from = 0; from < c.channels; from += channels) {
        const int64_t until = std::min(from + channels, c.channels);
        const int64_t first = from * c.kernel_size(), count = (until - from) * c.kernel_size();
        pad(c, band, from, until, around);
        lay_out(c, band, until - from, around, X);
        multiply<PARTS_OF_RANK>(band.places, width, count, {X, 1, band.places}, {A + first * width, width}, h,
                                width, from > 0);
        multiply<PARTS_OF_RANK>(count, width, band.places, {X, band.places}, {gh, width},
                                sums_A + first * width, width, true);
      }
      multiply<PARTS_OF_RANK>(c.out, width, band.places, g, {h, width}, sums_B, width, true);
    }
#pragma omp barrier
    own = share(lines, thread, threads);
    for (int64_t r = 0; r < c.rank; ++r)
      for (int64_t j = own.from; j < own.until; ++j) {
        float sum = 0;
        for (int64_t t = 0; t < threads; ++t) sum += all_sums[t * (size_A + size_B) + j * width + r];
        c.grad_A[r * lines + j] = sum;
      }
    own = share(c.out, thread, threads);
    for (int64_t o = own.from; o < own.until; ++o)
      for (int64_t r = 0; r < c.rank; ++r) {
        float sum = 0;
        for (int64_t t = 0; t < threads; ++t) sum += all_sums[t * (size_A + size_B) + size_A + o * width + r];
        c.grad_B[o * c.rank + r] = c.scale * sum;
      }
  }
}

// merged = W + s B A, all (out, lines): the kernel that does the work of both.
inline void merge_pair(int64_t out, int64_t lines, int64_t rank, float scale, int64_t num_threads,
                       const float* W, const float* A, const float* B, float* merged) {
  const int64_t whole = lines / COLUMNS * COLUMNS;
#pragma omp parallel num_threads(num_threads)
  {
    static thread_local Scratch scratch;
    Range own = share(out, omp_get_thread_num(), omp_get_num_threads(), TALL);
    float* scaled = sized(scratch, TALL * rank);
    for (int64_t o = own.from; o < own.until; o += TALL) {  // few rows at a time, one after another
      const int64_t rows = std::min<int64_t>(TALL, own.until - o);
      for (int64_t i = 0; i < rows * rank; ++i) scaled[i] = scale * B[o * rank + i];
      float* to = merged + o * lines;
      std::memcpy(to, W + o * lines, rows * lines * sizeof(float));
      multiply(rows, whole, rank, {scaled, rank}, {A, lines}, to, lines, true);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = whole; j < lines; ++j)
          for (int64_t r = 0; r < rank; ++r) to[i * lines + j] += scaled[i * rank + r] * A[r * lines + j];
    }
  }
}

inline void pair_gradients(const Convolution& c) {
  if (c.rank <= WIDTH)
    pair_gradients<1>(c);
  else
    pair_gradients<PARTS>(c);
}

}  // namespace loralab
