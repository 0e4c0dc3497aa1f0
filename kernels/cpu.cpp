// The passes over activations between convolutions, for CPUs. reference.py has the formulas and the layout of norm
// and sums. Each pass reads every element from memory once.
//
// A tensor is given as its channels_last memory: `count` elements, where element i belongs to channel i % channels.
// `channels` divides 64 or is a multiple of it, and `count` is a multiple of 64. So 64 neighbouring elements, which are
// four AVX-512 registers, use the coefficients of 64 neighbouring channels, or of all channels repeated, and their
// signs are one 64-bit word. Sums are taken over pieces of fixed size and added in a fixed order, so that results do
// not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t TILE = 64;      // elements that one word of signs covers
constexpr int64_t PIECE = 16384;   // elements that are summed in float before they are added in double

struct bfloat16 { uint16_t bits; };

inline float load(const float* p) { return *p; }
inline float load(const bfloat16* p) {
  uint32_t bits = uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* p, float value) { *p = value; }
inline void store(bfloat16* p, float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = value == value ? rounded : 0x7fc0;
}

// Returns the signs of 64 values: bit k is set where v[k] is positive.
inline uint64_t positive(const float* v) {
#ifdef __AVX512F__
  uint64_t word = 0;
  for (int k = 0; k < 4; ++k)
    word |= uint64_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(v + 16 * k), _mm512_setzero_ps(), _CMP_GT_OQ)) << 16 * k;
  return word;
#else
  uint64_t word = 0;
  for (int k = 0; k < 64; ++k) word |= uint64_t(v[k] > 0) << k;
  return word;
#endif
}

// Sets v[k] to 0 where bit k of `word` is not set.
inline void keep(float* v, uint64_t word) {
#ifdef __AVX512F__
  for (int k = 0; k < 4; ++k)
    _mm512_storeu_ps(v + 16 * k, _mm512_maskz_loadu_ps(__mmask16(word >> 16 * k), v + 16 * k));
#else
  for (int k = 0; k < 64; ++k) v[k] = (word >> k & 1) ? v[k] : 0.0f;
#endif
}

// The pieces in which a tensor is summed. Each has `size` elements in rows of `width`; the last may have fewer.
struct Pieces {
  int64_t count, channels, width, size, number;
  Pieces(int64_t count, int64_t channels)
      : count(count), channels(channels), width(std::max(TILE, channels)),
        size(std::max<int64_t>(1, PIECE / width) * width), number((count + size - 1) / size) {}

  int64_t rows(int64_t piece) const { return (std::min(count, (piece + 1) * size) - piece * size) / width; }

  // Calls body(piece, t, begin, end), in parallel over the pieces, for the tiles that start at begin, begin + width,
  // ... before `end`. All of these tiles use coefficients t to t + 63.
  template <class F>
  void for_tiles(F body) const {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < number; ++p)
      for (int64_t t = 0; t < width; t += TILE) body(p, t, p * size + t, std::min(count, (p + 1) * size));
  }
};

// 64 coefficients or sums, which the compiler keeps in registers.
struct Tile {
  float at[TILE];
  Tile() : at{} {}
  explicit Tile(const float* from) { std::copy(from, from + TILE, at); }
};

// Returns the coefficients of all channels, repeated until they fill at least one tile.
std::vector<float> tiled(const float* per_channel, int64_t channels) {
  std::vector<float> out(std::max(TILE, channels));
  for (size_t i = 0; i < out.size(); ++i) out[i] = per_channel[i % channels];
  return out;
}

// Sets dy to zero where the unit's output was not positive: by `signs` if given, else by z scale + shift if `relu`.
inline void mask(float* dy, const float* z, const uint64_t* signs, int relu, const Tile& scale, const Tile& shift) {
  if (signs)
    keep(dy, *signs);
  else if (relu)
    for (int k = 0; k < TILE; ++k) dy[k] = z[k] * scale.at[k] + shift.at[k] > 0 ? dy[k] : 0;
}

// Writes the norm of z to `norm`, and moves the running statistics towards those of z.
template <class T>
void statistics(const T* z, int64_t count, int64_t channels, const float* gamma, const float* beta, double eps,
                double momentum, float* running_mean, float* running_var, float* norm) {
  Pieces pieces(count, channels);
  int64_t width = pieces.width;
  std::vector<float> sums(pieces.number * 2 * width);
  pieces.for_tiles([&](int64_t p, int64_t t, int64_t begin, int64_t end) {
    Tile sum, square, mean;
    for (int64_t i = begin; i < end; i += width)
      for (int k = 0; k < TILE; ++k) sum.at[k] += load(z + i + k);
    for (int k = 0; k < TILE; ++k) mean.at[k] = sum.at[k] / pieces.rows(p);
    for (int64_t i = begin; i < end; i += width)  // again, now from the cache, about the piece's own mean
      for (int k = 0; k < TILE; ++k) {
        float deviation = load(z + i + k) - mean.at[k];
        square.at[k] += deviation * deviation;
      }
    std::copy(sum.at, sum.at + TILE, &sums[p * 2 * width + t]);
    std::copy(square.at, square.at + TILE, &sums[p * 2 * width + width + t]);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double n = double(count / channels), mean = 0, square = 0;
    for (int64_t p = 0; p < pieces.number; ++p)
      for (int64_t k = c; k < width; k += channels) mean += sums[p * 2 * width + k];
    mean /= n;
    for (int64_t p = 0; p < pieces.number; ++p) {
      double rows = pieces.rows(p), inverse = 1 / rows;
      for (int64_t k = c; k < width; k += channels) {
        double delta = sums[p * 2 * width + k] * inverse - mean;  // of the piece's mean
        square += sums[p * 2 * width + width + k] + rows * delta * delta;
      }
    }
    double rstd = 1 / std::sqrt(square / n + eps);
    norm[c] = mean;
    norm[channels + c] = rstd;
    norm[2 * channels + c] = gamma[c] * rstd;
    norm[3 * channels + c] = beta[c] - mean * gamma[c] * rstd;
    running_mean[c] += momentum * (mean - running_mean[c]);
    running_var[c] += momentum * (square / (n - 1) - running_var[c]);
  }
}

// Writes y = z scale + shift (+ shortcut), with ReLU if `relu`, and the signs of y if `signs` is given.
template <class T>
void activate(const T* z, int64_t count, int64_t channels, const float* norm, const T* shortcut, int relu, T* y,
              uint64_t* signs) {
  Pieces pieces(count, channels);
  auto scales = tiled(norm + 2 * channels, channels), shifts = tiled(norm + 3 * channels, channels);
  pieces.for_tiles([&](int64_t, int64_t t, int64_t begin, int64_t end) {
    Tile scale(&scales[t]), shift(&shifts[t]);
    for (int64_t i = begin; i < end; i += pieces.width) {
      float v[TILE];
      for (int k = 0; k < TILE; ++k) v[k] = load(z + i + k) * scale.at[k] + shift.at[k];
      if (shortcut)
        for (int k = 0; k < TILE; ++k) v[k] += load(shortcut + i + k);
      if (signs) signs[i / TILE] = positive(v);
      if (relu)
        for (int k = 0; k < TILE; ++k) v[k] = v[k] < 0 ? 0 : v[k];  // NaN stays NaN
      for (int k = 0; k < TILE; ++k) store(y + i + k, v[k]);
    }
  });
}

// Writes the sums of g, which is dy after `mask`. g is not stored, because masking dy again is cheaper.
template <class T>
void sum_gradients(const T* dy, const T* z, int64_t count, int64_t channels, const float* norm, const uint64_t* signs,
                   int relu, float* sums) {
  Pieces pieces(count, channels);
  int64_t width = pieces.width;
  std::vector<float> partial(pieces.number * 2 * width);
  auto scales = tiled(norm + 2 * channels, channels), shifts = tiled(norm + 3 * channels, channels);
  auto means = tiled(norm, channels);
  pieces.for_tiles([&](int64_t p, int64_t t, int64_t begin, int64_t end) {
    Tile scale(&scales[t]), shift(&shifts[t]), mean(&means[t]), by_z, plain;
    for (int64_t i = begin; i < end; i += width) {
      float v[TILE], x[TILE];
      for (int k = 0; k < TILE; ++k) v[k] = load(dy + i + k), x[k] = load(z + i + k);
      mask(v, x, signs ? signs + i / TILE : nullptr, relu, scale, shift);
      for (int k = 0; k < TILE; ++k) {
        by_z.at[k] += v[k] * (x[k] - mean.at[k]);
        plain.at[k] += v[k];
      }
    }
    std::copy(by_z.at, by_z.at + TILE, &partial[p * 2 * width + t]);
    std::copy(plain.at, plain.at + TILE, &partial[p * 2 * width + width + t]);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double by_z = 0, plain = 0, n = double(count / channels);
    for (int64_t p = 0; p < pieces.number; ++p)
      for (int64_t k = c; k < width; k += channels)
        by_z += partial[p * 2 * width + k], plain += partial[p * 2 * width + width + k];
    double rstd = norm[channels + c], s = norm[2 * channels + c], b = -s * rstd * rstd * by_z / n;
    sums[c] = by_z * rstd;
    sums[channels + c] = plain;
    sums[2 * channels + c] = b;
    sums[3 * channels + c] = -s * plain / n - b * norm[c];
  }
}

// Writes the gradient of z, dz = g scale + z b + c, where g is dy after `mask`.
template <class T>
void gradient(const T* dy, const T* z, int64_t count, int64_t channels, const float* norm, const uint64_t* signs,
              int relu, const float* sums, T* dz) {
  Pieces pieces(count, channels);
  auto scales = tiled(norm + 2 * channels, channels), shifts = tiled(norm + 3 * channels, channels);
  auto bs = tiled(sums + 2 * channels, channels), cs = tiled(sums + 3 * channels, channels);
  pieces.for_tiles([&](int64_t, int64_t t, int64_t begin, int64_t end) {
    Tile scale(&scales[t]), shift(&shifts[t]), b(&bs[t]), c(&cs[t]);
    for (int64_t i = begin; i < end; i += pieces.width) {
      float v[TILE], x[TILE];
      for (int k = 0; k < TILE; ++k) v[k] = load(dy + i + k), x[k] = load(z + i + k);
      mask(v, x, signs ? signs + i / TILE : nullptr, relu, scale, shift);
      for (int k = 0; k < TILE; ++k) store(dz + i + k, scale.at[k] * v[k] + b.at[k] * x[k] + c.at[k]);
    }
  });
}

// Adds dy to dx where the bit in `signs` is set.
template <class T>
void add_masked(const T* dy, int64_t count, const uint64_t* signs, T* dx) {
  Pieces(count, TILE).for_tiles([&](int64_t, int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += TILE) {
      float v[TILE];
      for (int k = 0; k < TILE; ++k) v[k] = load(dy + i + k);
      keep(v, signs[i / TILE]);
      for (int k = 0; k < TILE; ++k) store(dx + i + k, load(dx + i + k) + v[k]);
    }
  });
}

}  // namespace

#define EXPORT(T, suffix)                                                                                            \
  extern "C" void statistics_##suffix(const T* z, int64_t n, int64_t c, const float* gamma, const float* beta,       \
                                      double eps, double momentum, float* rm, float* rv, float* norm) {              \
    statistics(z, n, c, gamma, beta, eps, momentum, rm, rv, norm);                                                   \
  }                                                                                                                  \
  extern "C" void activate_##suffix(const T* z, int64_t n, int64_t c, const float* norm, const T* shortcut,          \
                                    int relu, T* y, uint64_t* signs) {                                               \
    activate(z, n, c, norm, shortcut, relu, y, signs);                                                               \
  }                                                                                                                  \
  extern "C" void sum_gradients_##suffix(const T* dy, const T* z, int64_t n, int64_t c, const float* norm,           \
                                         const uint64_t* signs, int relu, float* sums) {                             \
    sum_gradients(dy, z, n, c, norm, signs, relu, sums);                                                             \
  }                                                                                                                  \
  extern "C" void gradient_##suffix(const T* dy, const T* z, int64_t n, int64_t c, const float* norm,                \
                                    const uint64_t* signs, int relu, const float* sums, T* dz) {                     \
    gradient(dy, z, n, c, norm, signs, relu, sums, dz);                                                              \
  }                                                                                                                  \
  extern "C" void add_masked_##suffix(const T* dy, int64_t n, const uint64_t* signs, T* dx) {                        \
    add_masked(dy, n, signs, dx);                                                                                    \
  }
EXPORT(float, fp32)
EXPORT(bfloat16, bf16)
