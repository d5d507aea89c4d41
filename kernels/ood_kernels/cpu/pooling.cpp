// Per-channel mean and maximum of a feature map in one pass, see pooling.py, which compiles this file.
// fp32 sums, in an order that depends only on the layout and H*W. NaN propagates to the sum, not to the maximum.

#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16, CHANNELS = 512, RUN = 64;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr Words LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Float32 {
  typedef float Element;
  static Floats load(const float* x) {
    Floats values;
    memcpy(&values, x, sizeof values);
    return values;
  }
};

struct BFloat16 {
  typedef uint16_t Element;
  static Floats load(const uint16_t* x) {
    Halves halves;
    memcpy(&halves, x, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
  }
};

struct Float16 {
  typedef uint16_t Element;
#ifdef __AVX512F__
  static Floats load(const uint16_t* x) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
#else
  static Floats load(const uint16_t* x) {
    Halves halves;
    memcpy(&halves, x, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words), magnitude = bits & 0x7fff, shifted = magnitude << 13;
    const Words normal = shifted + (112u << 23), special = shifted | (255u << 23);
    // No intermediate is an fp32 subnormal, so flushing them to zero changes nothing.
    const Words one_up = (Words{} + 113u) << 23;
    const Words subnormal = (Words)((Floats)(shifted + one_up) - (Floats)one_up);
    const Words finite = magnitude < 0x400 ? subnormal : normal;
    return (Floats)((magnitude < 0x7c00 ? finite : special) | (bits & 0x8000) << 16);
  }
#endif
};

template <class T>
Floats load_some(const typename T::Element* x, int64_t count) {
  typename T::Element padded[LANES] = {};
  memcpy(padded, x, count * sizeof *x);
  return T::load(padded);
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats swapped(Floats values, uint32_t distance) {
#ifdef __clang__
  Floats others;
  for (uint32_t i = 0; i < LANES; i++) others[i] = values[i ^ distance];
  return others;
#else
  return __builtin_shuffle(values, LANE ^ distance);
#endif
}

inline float total(Floats values) {
  values += swapped(values, 8);
  values += swapped(values, 4);
  values += swapped(values, 2);
  values += swapped(values, 1);
  return values[0];
}

inline float largest(Floats values) {
  values = larger(values, swapped(values, 8));
  values = larger(values, swapped(values, 4));
  values = larger(values, swapped(values, 2));
  values = larger(values, swapped(values, 1));
  return values[0];
}

template <bool rectify>
struct Statistics {
  Floats sum = {}, rectified = {}, top = Floats{} + LOWEST;

  inline void take(Floats values) { take(values, values); }
  inline void take(Floats addends, Floats candidates) {
    sum += addends;
    if (rectify) rectified += larger(addends, Floats{});
    top = larger(candidates, top);
  }
};

struct Map {
  const void* data;
  int64_t samples, channels, positions, sample_stride, channel_stride, position_stride;
  float *h, *nap_mean, *maximum;
  int threads;
};

// Contiguous positions (NCHW).
template <class T, bool rectify>
void pool_rows(const Map& map) {
  const int64_t positions = map.positions, tail = positions % LANES, whole = positions - tail;
#pragma omp parallel for collapse(2) num_threads(map.threads)
  for (int64_t n = 0; n < map.samples; n++) {
    for (int64_t d = 0; d < map.channels; d++) {
      const auto* row = (const typename T::Element*)map.data + n * map.sample_stride + d * map.channel_stride;
      Statistics<rectify> row_statistics;
      for (int64_t p = 0; p < whole; p += LANES) row_statistics.take(T::load(row + p));
      if (tail && whole) {
        // The last full vector again, with the lanes already consumed masked out.
        const auto is_new = LANE >= (uint32_t)(LANES - tail);
        const Floats last = T::load(row + positions - LANES);
        row_statistics.take(is_new ? last : Floats{}, is_new ? last : Floats{} + LOWEST);
      } else if (tail) {
        const Floats all = load_some<T>(row, tail);
        row_statistics.take(all, LANE < (uint32_t)tail ? all : Floats{} + LOWEST);
      }
      const int64_t out = n * map.channels + d;
      map.h[out] = total(row_statistics.sum) / positions;
      if (rectify) map.nap_mean[out] = total(row_statistics.rectified) / positions;
      map.maximum[out] = largest(row_statistics.top);
    }
  }
}

// Contiguous channels (channels_last, tokens).
template <class T, bool rectify>
void pool_columns(const Map& map) {
  constexpr int64_t VECTORS = CHANNELS / LANES;
#pragma omp parallel for collapse(2) num_threads(map.threads)
  for (int64_t n = 0; n < map.samples; n++) {
    for (int64_t first = 0; first < map.channels; first += CHANNELS) {
      const int64_t count = map.channels - first < CHANNELS ? map.channels - first : CHANNELS;
      const int64_t whole = count / LANES, tail = count % LANES, vectors = whole + (tail > 0);
      Statistics<rectify> all[VECTORS];
      // Blocked summation: one long sum would lose more digits.
      for (int64_t from = 0; from < map.positions; from += RUN) {
        const int64_t to = from + RUN < map.positions ? from + RUN : map.positions;
        Statistics<rectify> run[VECTORS];
        for (int64_t p = from; p < to; p++) {
          const auto* line =
              (const typename T::Element*)map.data + n * map.sample_stride + p * map.position_stride + first;
          for (int64_t i = 0; i < whole; i++) run[i].take(T::load(line + i * LANES));
          if (tail) run[whole].take(load_some<T>(line + whole * LANES, tail));
        }
        for (int64_t i = 0; i < vectors; i++) {
          all[i].sum += run[i].sum;
          if (rectify) all[i].rectified += run[i].rectified;
          all[i].top = larger(run[i].top, all[i].top);
        }
      }
      const int64_t out = n * map.channels + first;
      for (int64_t i = 0; i < vectors; i++) {
        const size_t bytes = (i < whole ? LANES : tail) * sizeof(float);
        const Floats mean = all[i].sum / (float)map.positions, nap_mean = all[i].rectified / (float)map.positions;
        memcpy(map.h + out + i * LANES, &mean, bytes);
        if (rectify) memcpy(map.nap_mean + out + i * LANES, &nap_mean, bytes);
        memcpy(map.maximum + out + i * LANES, &all[i].top, bytes);
      }
    }
  }
}

template <class T, bool rectify>
void pool(const Map& map) {
  if (map.channel_stride == 1) pool_columns<T, rectify>(map);
  else pool_rows<T, rectify>(map);
}

template <class T>
void pool(const Map& map) {
  if (map.nap_mean) pool<T, true>(map);
  else pool<T, false>(map);
}

}  // namespace

// Strides in elements; the channel or the position stride is 1. A null nap_mean is skipped.
#define POOL(name, Type)                                                                                          \
  extern "C" void name(const void* data, int64_t samples, int64_t channels, int64_t positions,                    \
                       int64_t sample_stride, int64_t channel_stride, int64_t position_stride, float* h,          \
                       float* nap_mean, float* maximum, int threads) {                                            \
    pool<Type>({data, samples, channels, positions, sample_stride, channel_stride, position_stride, h, nap_mean,  \
                maximum, threads});                                                                               \
  }

POOL(pool_float32, Float32)
POOL(pool_bfloat16, BFloat16)
POOL(pool_float16, Float16)
