// One token appended to a compressed cache tensor: kernels/reference.py, append, bit for bit.

static inline uint16_t half_up(float x) {
  uint16_t h = float_half(x);
  return half_float(h) < x ? h + 1 : h;
}

// Encode body tokens first .. last-1, which x holds as floats [last-first, D]: whole scale blocks.
template <class F> static void encode(uint8_t* row, int h, int64_t N, int64_t first, int64_t last, const float* x) {
  constexpr int D = F::channels, t = std::max(F::t, 1);
  constexpr float C = F::kind == 1 ? F::doubled * 0.5f : 0.0f;
  for (int64_t i = first; i < last; i += t) {
    const float* block = x + (i - first) * D;
    alignas(64) float scale[D], middle[D];
    if constexpr (F::params > 0) {
      uint16_t* p = params<F>(row, h, N, i);
      for (int g = 0; g < F::groups; g++) {
        int a = g * F::c, b = std::min(D, a + F::c);
        float lo = INFINITY, hi = -INFINITY;
        for (int k = 0; k < t; k++)
          for (int d = a; d < b; d++) lo = std::min(lo, block[k * D + d]), hi = std::max(hi, block[k * D + d]);
        float m = 0, radius = std::max(std::fabs(lo), std::fabs(hi));
        if (F::params == 2) {
          p[2 * g + 1] = float_half((lo + hi) / 2);
          m = half_float(p[2 * g + 1]);
          radius = std::max(hi - m, m - lo);
        }
        p[g * F::params] = half_up(radius / (F::divisor * 0.5f));
        float s = half_float(p[g * F::params]);
        for (int d = a; d < b; d++) scale[d] = s, middle[d] = m;
      }
    }
    for (int k = 0; k < t; k++) {
      int64_t token = i + k, slice = token / 16;
      alignas(64) uint8_t code[D];
      for (int d = 0; d < D; d++) {
        float y = block[k * D + d];
        if (F::params == 2) y -= middle[d];
        y = scale[d] > 0 ? y / scale[d] : 0.0f;
        code[d] = uint8_t(std::nearbyint(std::min(std::max(y + C, 0.0f), F::levels - 1.0f)));
      }
      auto put = [&](int width, int before) {
        int per = 8 / width, shift = slice % per * width, mask = (1 << width) - 1;
        uint8_t* to = plane<F>(row, h, N, width, before) + (slice / per * 16 + token % 16) * D;
        for (int d = 0; d < D; d++) to[d] = (to[d] & ~(mask << shift)) | (code[d] >> before & mask) << shift;
      };
      put(F::low, 0);
      if constexpr (F::high > 0) put(F::high, F::low);
    }
  }
}

// a: in the order of native.append. False, and nothing is done, where the reference has more to do than this, or an
// error to raise: a position that is not the end, a full arena, fp8.
extern "C" bool kvc_append(const int64_t* a) {
  using F = K;
  constexpr int D = F::channels;
  uint8_t* data = reinterpret_cast<uint8_t*>(a[0]);
  const T* x = reinterpret_cast<const T*>(a[1]);
  int64_t batch = a[2], row_bytes = a[3], x_stride_b = a[4], x_stride_h = a[5], N = a[6], start = a[7];
  int64_t length = header<F>(data, 0).length, encoded = header<F>(data, 0).encoded;
  if (start >= 0 && start != length) return false;
  int64_t over = length + 1 - F::sink - encoded - F::recent;
  int64_t end = over > 0 ? encoded + (over + F::flush - 1) / F::flush * F::flush : encoded;
  if (end > N || (end > encoded && F::kind == 2)) return false;
  for (int64_t b = 0; b < batch; b++)
    for (int h = 0; h < F::heads; h++) {
      uint8_t* row = data + b * row_bytes;
      const T* token = x + b * x_stride_b + h * x_stride_h;
      if (end > encoded) {  // what leaves the ring is read before what enters it is written
        std::vector<float> leaving((end - encoded) * D);
        for (int64_t i = encoded; i < end; i++) {
          const T* from = i + F::sink < length ? exact<F>(row, h, i + F::sink) : token;
          if constexpr (F::kind == 0)
            std::memcpy(plane<F>(row, h, N, 8 * sizeof(T), 0) + i * D * sizeof(T), from, D * sizeof(T));
          else
            for (int d = 0; d < D; d++) leaving[(i - encoded) * D + d] = to_float(from[d]);
        }
        if constexpr (F::kind == 1) encode<F>(row, h, N, encoded, end, leaving.data());
      }
      if (length < F::sink || length >= F::sink + end) std::memcpy(exact<F>(row, h, length), token, D * sizeof(T));
      header<F>(row, h).length = length + 1;
      header<F>(row, h).encoded = end;
    }
  return true;
}
