// The passes over activations around a frozen convolution, for CPUs: each reads what it needs once.
//
// A tensor is its channels_last memory, `count` elements of which element i belongs to channel i % channels;
// `channels` divides 64 or is a multiple of it, and `count` is a multiple of 64. So 64 neighbours, four vector
// registers of AVX-512, always have the same 64 coefficients up to an offset, and their signs are one 64-bit word.
// Sums are taken over fixed pieces and added in a fixed order: results do not depend on the number of threads.

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
constexpr int64_t PIECE = 8192;   // elements that are summed in float before they are added in double

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

// The signs of 64 values, bit k for value k.
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

// v[k] where bit k is set, else 0.
inline void keep(float* v, uint64_t word) {
#ifdef __AVX512F__
  for (int k = 0; k < 4; ++k)
    _mm512_storeu_ps(v + 16 * k, _mm512_maskz_loadu_ps(__mmask16(word >> 16 * k), v + 16 * k));
#else
  for (int k = 0; k < 64; ++k) v[k] = (word >> k & 1) ? v[k] : 0.0f;
#endif
}

// Coefficients of `channels` channels, repeated to at least one tile.
std::vector<float> tiled(const float* coefficients, int64_t channels) {
  std::vector<float> out(std::max(TILE, channels));
  for (size_t i = 0; i < out.size(); ++i) out[i] = coefficients[i % channels];
  return out;
}

template <class F>
void for_pieces(int64_t count, int64_t width, F body) {  // pieces are whole multiples of `width`
  int64_t size = std::max<int64_t>(1, PIECE / width) * width, pieces = (count + size - 1) / size;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < pieces; ++p) body(p, p * size, std::min(count, (p + 1) * size));
}

int64_t number_of_pieces(int64_t count, int64_t width) {
  int64_t size = std::max<int64_t>(1, PIECE / width) * width;
  return (count + size - 1) / size;
}

// Rows mean, 1/deviation, gamma/deviation, beta - mean gamma/deviation of `norm`; running statistics follow.
template <class T>
void statistics(const T* z, int64_t count, int64_t channels, const float* gamma, const float* beta, double eps,
                double momentum, float* running_mean, float* running_var, float* norm) {
  int64_t width = std::max(TILE, channels), pieces = number_of_pieces(count, width);
  std::vector<float> sums(pieces * 2 * width);
  for_pieces(count, width, [&](int64_t p, int64_t begin, int64_t end) {
    float *sum = &sums[p * 2 * width], *square = sum + width;
    for (int64_t i = begin; i < end; i += width)
      for (int64_t t = 0; t < width; t += TILE)
        for (int k = 0; k < TILE; ++k) sum[t + k] += load(z + i + t + k);
    float inverse = float(width) / float(end - begin);
    for (int64_t i = begin; i < end; i += width)  // again, from the cache: deviations from the piece's own mean
      for (int64_t t = 0; t < width; t += TILE)
        for (int k = 0; k < TILE; ++k) {
          float deviation = load(z + i + t + k) - sum[t + k] * inverse;
          square[t + k] += deviation * deviation;
        }
  });
  for (int64_t c = 0; c < channels; ++c) {  // Chan, Golub, LeVeque 1979
    double n = 0, mean = 0, square = 0;
    int64_t size = std::max<int64_t>(1, PIECE / width) * width;
    for (int64_t p = 0; p < pieces; ++p) {
      double m = double(std::min(count, (p + 1) * size) - p * size) / width;
      for (int64_t k = c; k < width; k += channels) {
        double delta = sums[p * 2 * width + k] / m - mean;
        square += sums[p * 2 * width + width + k] + delta * delta * n * m / (n + m);
        mean += delta * m / (n + m);
        n += m;
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

// y = z scale + shift (+ shortcut), ReLU where asked for; `signs`: where y is positive.
template <class T>
void activate(const T* z, int64_t count, int64_t channels, const float* norm, const T* shortcut, int relu, T* y,
              uint64_t* signs) {
  int64_t width = std::max(TILE, channels);
  auto scale = tiled(norm + 2 * channels, channels), shift = tiled(norm + 3 * channels, channels);
  for_pieces(count, width, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += width)
      for (int64_t t = 0; t < width; t += TILE) {
        float v[TILE];
        const T* from = z + i + t;
        for (int k = 0; k < TILE; ++k) v[k] = load(from + k) * scale[t + k] + shift[t + k];
        if (shortcut)
          for (int k = 0; k < TILE; ++k) v[k] += load(shortcut + i + t + k);
        if (signs) signs[(i + t) / TILE] = positive(v);
        if (relu)
          for (int k = 0; k < TILE; ++k) v[k] = v[k] < 0 ? 0 : v[k];  // NaN stays NaN
        for (int k = 0; k < TILE; ++k) store(y + i + t + k, v[k]);
      }
  });
}

// g = dy where the unit's output was positive (by `signs`, else by z scale + shift; everywhere without ReLU).
// Rows of `sums`: gradient of gamma, of beta, and b, c of the gradient of z: scale g + b z + c.
template <class T>
void mask_and_sum(const T* dy, const T* z, int64_t count, int64_t channels, const float* norm, const uint64_t* signs,
                  int relu, T* g, float* sums) {
  int64_t width = std::max(TILE, channels), pieces = number_of_pieces(count, width);
  auto scale = tiled(norm + 2 * channels, channels), shift = tiled(norm + 3 * channels, channels),
       mean = tiled(norm, channels);
  std::vector<float> partial(pieces * 2 * width);
  for_pieces(count, width, [&](int64_t p, int64_t begin, int64_t end) {
    float *by_z = &partial[p * 2 * width], *plain = by_z + width;
    for (int64_t i = begin; i < end; i += width)
      for (int64_t t = 0; t < width; t += TILE) {
        float v[TILE], x[TILE];
        for (int k = 0; k < TILE; ++k) v[k] = load(dy + i + t + k), x[k] = load(z + i + t + k);
        if (signs)
          keep(v, signs[(i + t) / TILE]);
        else if (relu)
          for (int k = 0; k < TILE; ++k) v[k] = x[k] * scale[t + k] + shift[t + k] > 0 ? v[k] : 0;
        for (int k = 0; k < TILE; ++k) {
          by_z[t + k] += v[k] * (x[k] - mean[t + k]);
          plain[t + k] += v[k];
        }
        if (g)
          for (int k = 0; k < TILE; ++k) store(g + i + t + k, v[k]);
      }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double by_z = 0, plain = 0, n = double(count / channels);
    for (int64_t p = 0; p < pieces; ++p)
      for (int64_t k = c; k < width; k += channels)
        by_z += partial[p * 2 * width + k], plain += partial[p * 2 * width + width + k];
    double rstd = norm[channels + c], s = norm[2 * channels + c], b = -s * rstd * rstd * by_z / n;
    sums[c] = by_z * rstd;
    sums[channels + c] = plain;
    sums[2 * channels + c] = b;
    sums[3 * channels + c] = -s * plain / n - b * norm[c];
  }
}

// The gradient of z, scale g + b z + c.
template <class T>
void gradient(const T* g, const T* z, int64_t count, int64_t channels, const float* norm, const float* sums, T* dz) {
  int64_t width = std::max(TILE, channels);
  auto a = tiled(norm + 2 * channels, channels), b = tiled(sums + 2 * channels, channels),
       c = tiled(sums + 3 * channels, channels);
  for_pieces(count, width, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += width)
      for (int64_t t = 0; t < width; t += TILE)
        for (int k = 0; k < TILE; ++k)
          store(dz + i + t + k, a[t + k] * load(g + i + t + k) + b[t + k] * load(z + i + t + k) + c[t + k]);
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
  extern "C" void mask_and_sum_##suffix(const T* dy, const T* z, int64_t n, int64_t c, const float* norm,            \
                                        const uint64_t* signs, int relu, T* g, float* sums) {                        \
    mask_and_sum(dy, z, n, c, norm, signs, relu, g, sums);                                                           \
  }                                                                                                                  \
  extern "C" void gradient_##suffix(const T* g, const T* z, int64_t n, int64_t c, const float* norm,                 \
                                    const float* sums, T* dz) {                                                      \
    gradient(g, z, n, c, norm, sums, dz);                                                                            \
  }
EXPORT(float, fp32)
EXPORT(bfloat16, bf16)
