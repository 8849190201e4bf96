// Attention of a few queries over a compressed cache in one pass over its bytes: kernels/reference.py, attend.

struct Mask {
  const void* data;  // null: none
  int64_t kind;      // 1 bool, 2 added
  int64_t stride[4], width;

  // Adds what the mask says of positions p .. p+n-1 to the scores s.
  void add(int64_t b, int64_t head, int64_t query, int64_t p, int n, float* s) const {
    int64_t first = b * stride[0] + head * stride[1] + query * stride[2] + p * stride[3], step = stride[3];
    if (kind == 1) {
      const uint8_t* m = static_cast<const uint8_t*>(data) + first;
      for (int j = 0; j < n; j++) s[j] = m[j * step] ? s[j] : -INFINITY;
    } else {
      const T* m = static_cast<const T*>(data) + first;
      if (step == 1) VEC for (int j = 0; j < n; j++) s[j] += to_float(m[j]);
      else for (int j = 0; j < n; j++) s[j] += to_float(m[j * step]);
    }
  }
};

constexpr int TILE = 32;

// Vectors that stay in registers over a loop, which an array of floats does not.
typedef float Vec __attribute__((vector_size(64)));
constexpr int LANES = 16, DK = K::channels / LANES, DV = V::channels / LANES;
static_assert(K::channels % LANES == 0 && V::channels % LANES == 0);

static inline Vec vec(const float* x) {
  Vec y;
  std::memcpy(&y, x, sizeof(y));
  return y;
}

static inline float sum_lanes(Vec x) {
  alignas(64) float y[LANES], z[4];
  std::memcpy(y, &x, sizeof(y));
  for (int i = 0; i < 4; i++) z[i] = (y[i] + y[i + 4]) + (y[i + 8] + y[i + 12]);
  return (z[0] + z[1]) + (z[2] + z[3]);
}

struct Call {
  const T *q, *k_new, *v_new;
  uint8_t *k_data, *v_data;
  T* out;
  int64_t batch, heads, n, q_stride[3], k_stride[3], v_stride[3];
  int64_t k_row, v_row, k_room, v_room, length, causal;
  Mask mask;
  float scale;
};

// One head's queries over the positions first .. last-1: for each row the maximum, the sum, and the weighted values.
static void part(const Call& c, int64_t b, int h, int64_t first, int64_t last, float* top, float* sum, float* acc) {
  int64_t groups = c.heads / K::heads, rows = groups * c.n;
  uint8_t *k_row = c.k_data + b * c.k_row, *v_row = c.v_data + b * c.v_row;
  std::vector<float> q(rows * K::channels), weight(rows * TILE);
  alignas(64) float k[TILE * K::channels], v[TILE * V::channels];
  for (int64_t r = 0; r < rows; r++) {
    const T* from = c.q + b * c.q_stride[0] + (h * groups + r / c.n) * c.q_stride[1] + r % c.n * c.q_stride[2];
    for (int d = 0; d < K::channels; d++) q[r * K::channels + d] = to_float(from[d]) * c.scale;
  }
  std::fill(top, top + rows, -INFINITY);
  std::fill(sum, sum + rows, 0.0f);
  std::fill(acc, acc + rows * V::channels, 0.0f);
  for (int64_t p = first; p < last; p += TILE) {
    int n = int(std::min<int64_t>(TILE, last - p));
    load<K>(k_row, c.k_new + b * c.k_stride[0] + h * c.k_stride[1], c.k_stride[2], h, c.k_room, c.length, p, n, k);
    load<V>(v_row, c.v_new + b * c.v_stride[0] + h * c.v_stride[1], c.v_stride[2], h, c.v_room, c.length, p, n, v);
    for (int64_t r = 0; r < rows; r++) {
      float* s = &weight[r * TILE];
      Vec x[DK];
      for (int d = 0; d < DK; d++) x[d] = vec(&q[(r * DK + d) * LANES]);
      for (int j = 0; j < n; j++) {
        Vec dot = x[0] * vec(k + j * K::channels);
        for (int d = 1; d < DK; d++) dot += x[d] * vec(k + (j * DK + d) * LANES);
        s[j] = sum_lanes(dot);
      }
      int64_t query = r % c.n;
      if (c.mask.data)
        c.mask.add(b, h * groups + r / c.n, query, p, n, s);
      else if (c.causal)
        for (int j = 0; j < n; j++) s[j] = p + j > c.length + query ? -INFINITY : s[j];
      float m = top[r], total = 0;
#pragma omp simd reduction(max : m)
      for (int j = 0; j < n; j++) m = std::max(m, s[j]);
      if (m == -INFINITY) continue;
      float fade = exp_negative(top[r] - m);
#pragma omp simd reduction(+ : total)
      for (int j = 0; j < n; j++) {
        s[j] = exp_negative(s[j] - m);
        total += s[j];
      }
      top[r] = m;
      sum[r] = sum[r] * fade + total;
      Vec o[DV];
      for (int d = 0; d < DV; d++) o[d] = vec(acc + (r * DV + d) * LANES) * fade;
      for (int j = 0; j < n; j++)
        for (int d = 0; d < DV; d++) o[d] += s[j] * vec(v + (j * DV + d) * LANES);
      std::memcpy(acc + r * V::channels, o, sizeof(o));
    }
  }
}

// a: in the order of native.attend. False, and nothing is done, where the reference has an error to raise.
extern "C" bool kvc_attend(const int64_t* a, double scale) {
  Call c;
  int i = 0;
  auto pointer = [&] { return reinterpret_cast<void*>(a[i++]); };
  c.q = static_cast<T*>(pointer()), c.k_data = static_cast<uint8_t*>(pointer());
  c.v_data = static_cast<uint8_t*>(pointer()), c.k_new = static_cast<T*>(pointer());
  c.v_new = static_cast<T*>(pointer()), c.out = static_cast<T*>(pointer()), c.mask.data = pointer();
  c.batch = a[i++], c.heads = a[i++], c.n = a[i++];
  for (auto* strides : {c.q_stride, c.k_stride, c.v_stride})
    for (int j = 0; j < 3; j++) strides[j] = a[i++];
  c.k_row = a[i++], c.v_row = a[i++], c.k_room = a[i++], c.v_room = a[i++];
  int64_t start = a[i++];
  c.causal = a[i++], c.mask.kind = a[i++], c.mask.width = a[i++];
  for (int j = 0; j < 4; j++) c.mask.stride[j] = a[i++];
  int64_t mask_batch = a[i++], mask_heads = a[i++];
  c.scale = float(scale);

  int64_t k_length = header<K>(c.k_data, 0).length, v_length = header<V>(c.v_data, 0).length;
  c.length = start < 0 ? k_length : start;
  if (c.length > std::min(k_length, v_length) || (start < 0 && k_length != v_length)) return false;
  int64_t total = c.length + c.n;
  if (c.mask.data) {
    if (c.mask.width < total) return false;
    for (int64_t b = 0; b < mask_batch; b++)
      for (int64_t h = 0; h < mask_heads; h++)
        for (int64_t j = 0; j < c.n; j++)
          for (int64_t p = total; p < c.mask.width; p++) {
            float seen = 0;
            c.mask.add(b, h, j, p, 1, &seen);
            if (seen > -1e4f) return false;
          }
  }
  int64_t heads = c.batch * K::heads, rows = c.heads / K::heads * c.n;
  int64_t threads = omp_get_max_threads(), tiles = (total + TILE - 1) / TILE;
  // a thread's share is some tiles of some heads: several shares a thread, so that none waits long for another
  int64_t splits = std::max<int64_t>(1, std::min(tiles / 8, (4 * threads + heads - 1) / heads));
  int64_t span = (tiles + splits - 1) / splits * TILE;
  int64_t size = rows * (V::channels + 2);
  std::vector<float> parts(heads * splits * size);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (heads * tiles > 16)
  for (int64_t w = 0; w < heads * splits; w++) {
    int64_t first = w % splits * span, last = std::min(total, first + span);
    float* at = &parts[w * size];
    part(c, w / splits / K::heads, int(w / splits % K::heads), first, last, at, at + rows, at + 2 * rows);
  }
  for (int64_t g = 0; g < heads; g++)
    for (int64_t r = 0; r < rows; r++) {
      alignas(64) float o[V::channels] = {};
      float top = -INFINITY, sum = 0;
      for (int64_t s = 0; s < splits; s++) top = std::max(top, parts[(g * splits + s) * size + r]);
      for (int64_t s = 0; s < splits && top > -INFINITY; s++) {
        const float* at = &parts[(g * splits + s) * size];
        float fade = exp_negative(at[r] - top);
        sum += fade * at[rows + r];
        VEC for (int d = 0; d < V::channels; d++) o[d] += fade * at[2 * rows + r * V::channels + d];
      }
      float inverse = sum > 0 ? 1 / sum : 0;
      T* to = c.out + (g * rows + r) * V::channels;
      for (int d = 0; d < V::channels; d++) store(o[d] * inverse, to + d);
    }
  return true;
}
