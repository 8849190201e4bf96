// How the CPU kernels read a compressed cache: the stored form of kvc_compile/layout.py, decoded in registers and L1.
//
// lowering/native.py puts a kernel together from a rendered head, which defines the structs K and V (the facts of the
// layouts), this file, and attend.cpp or append.cpp. Symbols: T the model's type, i token of the body, p position, h
// head, N capacity in tokens, D channels, t and c the tokens and channels of a scale block.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>
#include <omp.h>

#define VEC _Pragma("omp simd")

template <class To, class From> static inline To bits(From x) {
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

static inline float to_float(float x) { return x; }
static inline float to_float(Bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
// fp16 moved under the exponent of fp32, whose bias is larger by 112
static inline float half_float(uint32_t h) {
  uint32_t magnitude = (h & 0x7fff) << 13;
  float scaled = bits<float>(magnitude) * 5.192296858534828e33f;  // 2^112
  uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u | magnitude : bits<uint32_t>(scaled);
  return bits<float>(special | (h & 0x8000) << 16);
}
static inline float to_float(Half x) { return half_float(x.bits); }

static inline void store(float x, float* out) { *out = x; }
static inline void store(float x, Bf16* out) {
  uint32_t b = bits<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
// nearest even, by letting fp32 addition round at the place of fp16's last bit
static inline uint16_t float_half(float x) {
  uint32_t b = bits<uint32_t>(x), sign = b >> 16 & 0x8000;
  b &= 0x7fffffff;
  if (b > 0x7f800000) return sign | 0x7e00;
  if (b >= 0x477ff000) return sign | 0x7c00;
  if (b < 0x38800000) return sign | uint16_t(bits<uint32_t>(bits<float>(b) + 0.5f) - 0x3f000000);
  return sign | uint16_t((b + 0xfff + (b >> 13 & 1) - 0x38000000) >> 13);
}
static inline void store(float x, Half* out) { out->bits = float_half(x); }

static inline float fp8_float(uint32_t x) {  // e4m3fn
  if ((x & 0x7f) == 0x7f) return NAN;
  return half_float((x & 0x80) << 8 | (x & 0x7f) << 7) * 256.0f;
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87
static inline float exp_negative(float x) {
  float y = std::max(x, -87.0f) * 1.44269504f;
  float whole = std::nearbyint(y), f = y - whole;
  float p = 1.0f + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * (0.00133336f + f * 0.00015404f)))));
  float r = p * bits<float>(int32_t(whole + 127.0f) << 23);
  return x < -87.0f ? 0.0f : r;
}

struct Header { int64_t length, encoded, fault, unused; };

template <class F> static inline Header& header(uint8_t* row, int h) { return reinterpret_cast<Header*>(row)[h]; }

template <class F> static inline T* exact(uint8_t* row, int h, int64_t p) {
  if (p < F::sink) return reinterpret_cast<T*>(row + F::sink_offset) + (int64_t(h) * F::sink + p) * F::channels;
  int64_t slot = (p - F::sink) % std::max(F::recent, 1);
  return reinterpret_cast<T*>(row + F::ring_offset) + (int64_t(h) * F::recent + slot) * F::channels;
}

template <class F> static inline uint8_t* plane(uint8_t* row, int h, int64_t N, int bits, int before) {
  return row + F::body_offset + N * F::channels * F::heads * before / 8 + N * F::channels * bits / 8 * h;
}

template <class F> static inline uint16_t* params(uint8_t* row, int h, int64_t N, int64_t i) {
  uint8_t* base = row + F::body_offset + N * F::channels * F::heads * (F::low + F::high) / 8;
  constexpr int t = std::max(F::t, 1);
  return reinterpret_cast<uint16_t*>(base) + (h * (N / t) + i / t) * F::groups * F::params;
}

// Codes of the rows i .. i+n-1, all in one slice of 16 tokens, added up from the planes.
template <class F> static inline void load_codes(uint8_t* row, int h, int64_t N, int64_t i, int n, float* out) {
  constexpr int D = F::channels;
  int64_t slice = i / 16, first = i % 16;
  auto fields = [&](int width, int before) {
    int per = 8 / width, shift = slice % per * width, mask = (1 << width) - 1;
    return std::make_tuple(plane<F>(row, h, N, width, before) + (slice / per * 16 + first) * D, shift, mask);
  };
  auto [low, low_shift, low_mask] = fields(F::low, 0);
  const uint8_t* a = low;
  if constexpr (F::high > 0) {
    auto [high, high_shift, high_mask] = fields(F::high, F::low);
    const uint8_t* b = high;
    VEC for (int j = 0; j < n * D; j++)
      out[j] = float((a[j] >> low_shift & low_mask) | (b[j] >> high_shift & high_mask) << F::low);
  } else {
    VEC for (int j = 0; j < n * D; j++) out[j] = float(a[j] >> low_shift & low_mask);
  }
}

// Decoded body tokens i .. i+n-1, all in one slice of 16.
template <class F> static inline void decode(uint8_t* row, int h, int64_t N, int64_t i, int n, float* out) {
  constexpr int D = F::channels;
  if constexpr (F::kind == 1) {
    load_codes<F>(row, h, N, i, n, out);
  } else if constexpr (F::kind == 2) {
    const uint8_t* a = plane<F>(row, h, N, 8, 0) + i * D;
    VEC for (int j = 0; j < n * D; j++) out[j] = fp8_float(a[j]);
  } else {
    const T* a = reinterpret_cast<const T*>(plane<F>(row, h, N, 8 * sizeof(T), 0)) + i * D;
    VEC for (int j = 0; j < n * D; j++) out[j] = to_float(a[j]);
  }
  if constexpr (F::params > 0) {
    constexpr float C = F::kind == 1 ? F::doubled * 0.5f : 0.0f;
    alignas(64) float scale[D], middle[D];
    for (int k = 0; k < n; k++) {
      float* x = out + k * D;
      const uint16_t* p = params<F>(row, h, N, i + k);
      if constexpr (F::c == 1) {  // a number per channel, kept while the block lasts
        if (k == 0 || (i + k) % F::t == 0) VEC for (int d = 0; d < D; d++) {
          scale[d] = half_float(p[d * F::params]);
          middle[d] = F::params == 2 ? half_float(p[d * F::params + 1]) : 0.0f;
        }
        VEC for (int d = 0; d < D; d++) x[d] = (x[d] - C) * scale[d] + middle[d];
      } else {
        for (int g = 0; g < F::groups; g++) {
          float s = half_float(p[g * F::params]), m = F::params == 2 ? half_float(p[g * F::params + 1]) : 0.0f;
          VEC for (int d = g * F::c; d < std::min(D, (g + 1) * F::c); d++) x[d] = (x[d] - C) * s + m;
        }
      }
    }
  }
}

// The tokens at positions p .. p+n-1 of a head, from wherever they are: sink, body, ring, or new from `length` on.
template <class F> static inline void load(
    uint8_t* row, const T* fresh, int64_t stride, int h, int64_t N, int64_t length, int64_t p, int n, float* out) {
  constexpr int D = F::channels;
  int64_t encoded = header<F>(row, h).encoded;
  for (int64_t end = p + n; p < end;) {
    int64_t i = p - F::sink;
    int take = 1;
    if (p < length && i >= 0 && i < encoded) {
      take = int(std::min({end - p, 16 - i % 16, encoded - i, length - p}));
      decode<F>(row, h, N, i, take, out);
    } else {
      const T* from = p < length ? exact<F>(row, h, p) : fresh + (p - length) * stride;
      VEC for (int d = 0; d < D; d++) out[d] = to_float(from[d]);
    }
    out += take * D;
    p += take;
  }
}
