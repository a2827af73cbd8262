// The kernels, written once on vectors of MXFP8MOE_WIDTH floats (GCC's and clang's vector extensions) and compiled once
// per instruction set by kernels_<isa>.cpp, each into a namespace of its own. Only the conversions differ.

namespace mxfp8moe::cpu {
namespace MXFP8MOE_ISA {
namespace {

constexpr int W = MXFP8MOE_WIDTH;
constexpr int kVecs = kBlock / W;  // vectors per block
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint8_t B __attribute__((vector_size(W)));

#define MXFP8MOE_INLINE inline __attribute__((always_inline))

MXFP8MOE_INLINE F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
MXFP8MOE_INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof(v)); }
MXFP8MOE_INLINE I bits(F v) { return (I)v; }
MXFP8MOE_INLINE F floats(I v) { return (F)v; }
MXFP8MOE_INLINE F splat(float x) { return x - F{}; }
MXFP8MOE_INLINE I splat(int32_t x) { return x - I{}; }

inline float sum(F v) {  // in a fixed order
  float lanes[W];
  store(lanes, v);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// --- e4m3 codes to floats -------------------------------------------------------------------------------------------

#if MXFP8MOE_WIDTH == 4

// By table: there is no conversion to use.
constexpr float kDecodedUnit = 1.0f;  // what decode() makes of the code of 1.0
MXFP8MOE_INLINE void decode_finite(const uint8_t* p, F* out) {
  for (int i = 0; i < kVecs; ++i) {
    float lanes[W];
    for (int j = 0; j < W; ++j) lanes[j] = kDecodeTable[p[i * W + j]];
    out[i] = load(lanes);
  }
}
MXFP8MOE_INLINE void decode(const uint8_t* p, F* out) { decode_finite(p, out); }
typedef int NanWatch;  // the table has the NaN in it already
MXFP8MOE_INLINE NanWatch nan_unseen() { return 0; }
MXFP8MOE_INLINE NanWatch look_for_nan(NanWatch watch, const uint8_t*) { return watch; }
MXFP8MOE_INLINE bool nan_seen(NanWatch) { return false; }

MXFP8MOE_INLINE F load_half(const void* p) {
  float lanes[W];
  uint16_t h[W];
  std::memcpy(h, p, sizeof(h));
  for (int i = 0; i < W; ++i) lanes[i] = c10::detail::fp16_ieee_to_fp32_value(h[i]);
  return load(lanes);
}
MXFP8MOE_INLINE void store_half(void* p, F v) {
  float lanes[W];
  uint16_t h[W];
  store(lanes, v);
  for (int i = 0; i < W; ++i) h[i] = c10::detail::fp16_ieee_from_fp32_value(lanes[i]);
  std::memcpy(p, h, sizeof(h));
}

#else

// An e4m3 code's exponent and mantissa, shifted to where fp16 has its own, are an fp16 of the same value times 2^-8,
// subnormals included (fp16's bias is 15, e4m3's 7). The NaN code 0x7F would come out as 480.
constexpr float kDecodedUnit = 0x1p-8f;

// Looks for NaN codes 32 bytes at a time, beside a decode that does not: their largest code so far, doubled to shift its
// sign out; NaN is 0xFE.
typedef __m256i NanWatch;
MXFP8MOE_INLINE NanWatch nan_unseen() { return _mm256_setzero_si256(); }
MXFP8MOE_INLINE NanWatch look_for_nan(NanWatch watch, const uint8_t* p) {
  const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_max_epu8(watch, _mm256_add_epi8(code, code));
}
MXFP8MOE_INLINE bool nan_seen(NanWatch watch) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(watch, _mm256_set1_epi8(int8_t(0xFE)))) != 0;
}

#if MXFP8MOE_WIDTH == 8
MXFP8MOE_INLINE __m256i halves(const uint8_t* p) {  // 16 codes
  const __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_si256(_mm256_slli_epi16(code, 7), _mm256_set1_epi16(int16_t(0xBF80)));
}
MXFP8MOE_INLINE void convert(__m256i half, F* out) {
  out[0] = (F)_mm256_cvtph_ps(_mm256_castsi256_si128(half));
  out[1] = (F)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}
MXFP8MOE_INLINE void decode_finite(const uint8_t* p, F* out) {
  convert(halves(p), out);
  convert(halves(p + 16), out + 2);
}
MXFP8MOE_INLINE void decode(const uint8_t* p, F* out) {
  for (int i = 0; i < 2; ++i) {
    const __m256i half = halves(p + 16 * i);
    const __m256i magnitude = _mm256_set1_epi16(0x3F80);
    convert(_mm256_or_si256(half, _mm256_cmpeq_epi16(_mm256_and_si256(half, magnitude), magnitude)), out + 2 * i);
  }
}
MXFP8MOE_INLINE F load_half(const void* p) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
MXFP8MOE_INLINE void store_half(void* p, F v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
MXFP8MOE_INLINE __m512i halves(const uint8_t* p) {  // 32 codes
  const __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_and_si512(_mm512_slli_epi16(code, 7), _mm512_set1_epi16(int16_t(0xBF80)));
}
MXFP8MOE_INLINE void convert(__m512i half, F* out) {
  out[0] = (F)_mm512_cvtph_ps(_mm512_castsi512_si256(half));
  out[1] = (F)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}
MXFP8MOE_INLINE void decode_finite(const uint8_t* p, F* out) { convert(halves(p), out); }
MXFP8MOE_INLINE void decode(const uint8_t* p, F* out) {
  const __m512i half = halves(p), magnitude = _mm512_set1_epi16(0x3F80);
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, magnitude), magnitude);
  convert(_mm512_mask_blend_epi16(nan, half, _mm512_set1_epi16(0x7E00)), out);
}
MXFP8MOE_INLINE F load_half(const void* p) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
MXFP8MOE_INLINE void store_half(void* p, F v) {
  _mm256_storeu_si256(
      static_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
#endif

// --- Scale bytes and rounding ---------------------------------------------------------------------------------------

// The scale byte of a block whose largest magnitude has these bits; reference.scale_bytes in Python defines it.
inline int32_t scale_byte(int32_t amax, ScaleRounding rounding) {
  if (amax >= 0x7F800000) return 255;
  if (rounding == ScaleRounding::rceil) {
    const int32_t descale = float_bits(bits_float(amax) / 448.0f);
    const int32_t exponent = descale >> 23, mantissa = descale & 0x7FFFFF, slack = kSlackTable[exponent];
    return exponent ? exponent + (mantissa > slack) : mantissa > (1 << 22) + slack;
  }
  if (rounding == ScaleRounding::even) amax += 1 << 19;
  const int32_t exponent = (amax >> 23) + (rounding == ScaleRounding::ceil && (amax & 0x7FFFFF) != 0);
  return std::max(exponent - 8, 0);
}
inline float inverse_scale(int32_t byte) { return bits_float(std::max(254 - byte, 0) << 23); }  // 2^(127 - byte)

MXFP8MOE_INLINE F clamp(F v, F low, F high) {  // keeps NaN
  v = v < low ? low : v;
  return v > high ? high : v;
}

// To the nearest e4m3 value, ties to even, saturated. Adding 1.5 * 2^23 quanta leaves no smaller digit.
MXFP8MOE_INLINE F round_e4m3(F v) {
  v = clamp(v, splat(-448.0f), splat(448.0f));
  I exponent = bits(v) & 0x7F800000;
  exponent = exponent < (121 << 23) ? splat(121 << 23) : exponent;  // below 2^-6 the quantum stays 2^-9
  const F magic = floats((exponent + (20 << 23)) | 0x400000);
  return (v + magic) - magic;
}
// The codes of v, rounded as round_e4m3 rounds it but in the bits of the number; v is no NaN.
MXFP8MOE_INLINE I encode_e4m3(F v) {
  const I magnitude = bits(v) & 0x7FFFFFFF;
  // Half an ulp of 20 dropped bits, less where that would round a tie to odd; the carry goes into the exponent.
  const I rounded = (magnitude + ((magnitude >> 20) & 1) + (0x7FFFF - (120 << 23))) >> 20;
  const I normal = rounded < 0x7E ? rounded : splat(0x7E);
  const I subnormal = bits(floats(magnitude) + 0x1p14f) - splat(float_bits(0x1p14f));  // multiples of 2^-9
  return (magnitude < (121 << 23) ? subnormal : normal) | ((bits(v) >> 24) & 0x80);
}
// A block's codes, one to a lane, as bytes.
MXFP8MOE_INLINE void store_codes(uint8_t* p, const I* code) {
#if MXFP8MOE_WIDTH == 8
  const __m256i low = _mm256_packs_epi32((__m256i)code[0], (__m256i)code[1]);  // within halves of 128 bits
  const __m256i high = _mm256_packs_epi32((__m256i)code[2], (__m256i)code[3]);
  const __m256i in_turn = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), in_turn);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
#else
  for (int i = 0; i < kVecs; ++i) {
    const B bytes = __builtin_convertvector(code[i], B);
    __builtin_memcpy(p + i * W, &bytes, sizeof(bytes));
  }
#endif
}
MXFP8MOE_INLINE F round_bf16(F v) {
  const I b = bits(v);
  const I rounded = (b + 0x7FFF + ((b >> 16) & 1)) & ~0xFFFF;
  return floats((b & 0x7FFFFFFF) > 0x7F800000 ? (b | 0x400000) & ~0xFFFF : rounded);
}

MXFP8MOE_INLINE I magnitude_bits(F v) { return bits(v) & 0x7FFFFFFF; }
MXFP8MOE_INLINE I max_bits(I a, I b) { return a > b ? a : b; }  // of magnitudes: NaN above Inf above the finite
MXFP8MOE_INLINE int32_t max_lane(I v) {  // of magnitudes
#if MXFP8MOE_WIDTH == 4
  return std::max(std::max(v[0], v[1]), std::max(v[2], v[3]));
#else
#if MXFP8MOE_WIDTH == 16
  const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256((__m512i)v), _mm512_extracti64x4_epi64((__m512i)v, 1));
#else
  const __m256i half = (__m256i)v;
#endif
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xB1)));
#endif
}

// --- Values of other types ------------------------------------------------------------------------------------------

inline void load_bias(const Rows& bias, int64_t index, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = bias.data ? load_scalar(bias, index + i) : 0.0f;
}

MXFP8MOE_INLINE F load_bf16(const char* p) {
  H h;
  __builtin_memcpy(&h, p, sizeof(h));
  return floats(__builtin_convertvector(h, I) << 16);
}
MXFP8MOE_INLINE void store_bf16(char* p, F v) {
  const H h = __builtin_convertvector((bits(round_bf16(v)) >> 16) & 0xFFFF, H);
  __builtin_memcpy(p, &h, sizeof(h));
}

// 32 values of type `kind` at p.
MXFP8MOE_INLINE void load_block(const char* p, Kind kind, F* out) {
  for (int i = 0; i < kVecs; ++i) {
    if (kind == Kind::f32) out[i] = load(reinterpret_cast<const float*>(p) + i * W);
    else if (kind == Kind::bf16) out[i] = load_bf16(p + 2 * i * W);
    else out[i] = load_half(p + 2 * i * W);
  }
}
MXFP8MOE_INLINE void store_block(char* p, Kind kind, const F* v) {
  for (int i = 0; i < kVecs; ++i) {
    if (kind == Kind::f32) store(reinterpret_cast<float*>(p) + i * W, v[i]);
    else if (kind == Kind::bf16) store_bf16(p + 2 * i * W, v[i]);
    else store_half(p + 2 * i * W, v[i]);
  }
}
inline int32_t block_scale_byte(const F* v, ScaleRounding rounding) {
  I largest = magnitude_bits(v[0]);
  for (int i = 1; i < kVecs; ++i) largest = max_bits(largest, magnitude_bits(v[i]));
  return scale_byte(max_lane(largest), rounding);
}

// A block rounded to MXFP8 and back.
inline void round_block(F* v) {
  const int32_t byte = block_scale_byte(v, ScaleRounding::rceil);
  const float inverse = inverse_scale(byte), scale = kScaleTable[byte];
  for (int i = 0; i < kVecs; ++i) v[i] = round_e4m3(v[i] * inverse) * scale;
}

void quantize_row(const char* x, Kind kind, ScaleRounding rounding, int64_t columns, uint8_t* data, uint8_t* scale) {
  for (int64_t column = 0; column < columns; column += kBlock, data += kBlock) {
    F v[kVecs];
    load_block(x + column * size_of(kind), kind, v);
    const int32_t byte = block_scale_byte(v, rounding);
    *scale++ = uint8_t(byte);
    if (byte == 255) {
      std::memset(data, 0x7F, kBlock);
      continue;
    }
    const float inverse = inverse_scale(byte);
    I code[kVecs];
    for (int i = 0; i < kVecs; ++i) code[i] = encode_e4m3(v[i] * inverse);
    store_codes(data, code);
  }
}

// The values of a block of codes with their scale: exact, but for overflow to infinity.
MXFP8MOE_INLINE void dequantize_block(const uint8_t* codes, uint8_t scale, F* v) {
  decode(codes, v);
  for (int i = 0; i < kVecs; ++i) v[i] = (v[i] * (1.0f / kDecodedUnit)) * kScaleTable[scale];
}

void dequantize_row(const uint8_t* data, const uint8_t* scale, int64_t columns, char* out, Kind kind) {
  for (int64_t column = 0; column < columns; column += kBlock) {
    F v[kVecs];
    dequantize_block(data + column, *scale++, v);
    store_block(out + column * size_of(kind), kind, v);
  }
}

// --- Activations ----------------------------------------------------------------------------------------------------

// Block `block` of token `token`, as it enters the first product.
MXFP8MOE_INLINE void load_activation(const Plan& plan, int64_t token, int64_t block, F* v) {
  const Rows& rows = plan.hidden_states;
  const char* p = rows.data + (token * rows.stride + block * kBlock) * size_of(rows.kind);
  if (plan.hidden_states_scale) {
    const uint8_t scale = plan.hidden_states_scale[token * plan.hidden_states_scale_stride + block];
    dequantize_block(reinterpret_cast<const uint8_t*>(p), scale, v);
    return;
  }
  load_block(p, rows.kind, v);
  if (plan.activation_dtype == ActivationDtype::mxfp8) {
    round_block(v);
  } else {
    for (int i = 0; i < kVecs; ++i) v[i] = round_bf16(v[i]);
  }
}

void pack(const Plan& plan, const TokenBlock& tokens) {
  const Group& group = *tokens.group;
  const int64_t begin = tokens.begin, count = tokens.end - begin, blocks = plan.hidden / kBlock;
  const int64_t* routes = plan.routes.data() + group.first + begin;
  if (group.in_rows()) {
    for (int64_t i = 0; i < count; ++i) {
      float* row = group.x + (begin + i) * plan.hidden;
      for (int64_t block = 0; block < blocks; ++block) {
        F v[kVecs];
        load_activation(plan, plan.first_token + routes[i] / plan.topk, block, v);
        for (int j = 0; j < kVecs; ++j) store(row + block * kBlock + j * W, v[j]);
      }
    }
    return;
  }
  float* panel = group.x + begin * plan.hidden;
  float lanes[W][kBlock] = {};
  for (int64_t block = 0; block < blocks; ++block, panel += kBlock * W) {
    for (int64_t i = 0; i < count; ++i) {
      F v[kVecs];
      load_activation(plan, plan.first_token + routes[i] / plan.topk, block, v);
      for (int j = 0; j < kVecs; ++j) store(lanes[i] + j * W, v[j]);
    }
    for (int column = 0; column < kBlock; ++column)
      for (int i = 0; i < W; ++i) panel[column * W + i] = lanes[i][column];
  }
}

// e^x, to about 1 ulp; Inf above 88.7, NaN stays. Cephes' expf (https://www.netlib.org/cephes/), its polynomial.
MXFP8MOE_INLINE F exp(F x) {
  x = clamp(x, splat(-87.0f), splat(89.0f));
  const F n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // to an integer: 1.5 * 2^23
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I exponent = bits(n + 12582912.0f) - 0x4B400000;  // n as an integer
  const I half = exponent >> 1;
  return p * floats((half + 127) << 23) * floats((exponent - half + 127) << 23);
}

MXFP8MOE_INLINE F swiglu(const Plan& plan, F gate, F up) {
  gate = gate > plan.limit ? splat(plan.limit) : gate;
  up = clamp(up, splat(-plan.limit), splat(plan.limit));
  return gate * (1.0f / (1.0f + exp(-plan.alpha * gate))) * (up + plan.beta);
}

// --- Products -------------------------------------------------------------------------------------------------------

// One weight row times `Tokens` rows of activations, straight from the codes. x: token i at x + i * columns.
template <int Tokens>
void dot_row(const uint8_t* w, const uint8_t* scale, const float* x, int64_t columns, float* out, int64_t out_stride) {
  // Enough independent sums to cover the latency of a multiply-add, and few enough to stay in registers.
  constexpr int kSums = Tokens == 1 ? 1 : std::min(kVecs, Tokens == 2 ? 4 : Tokens <= 4 || W == 16 ? 2 : 1);
  F acc[kSums][Tokens] = {};
  NanWatch watch = nan_unseen();
  for (int64_t column = 0; column < columns; column += kBlock) {
    F v[kVecs];
    const uint8_t* p = w + column;
    __builtin_prefetch(p + 2048);
    decode_finite(p, v);
    watch = look_for_nan(watch, p);
    const F factor = splat(kScaleTable[scale[column / kBlock]]);
    if constexpr (Tokens == 1) {  // one product with the scale per block instead of one per vector
      F block = v[0] * load(x + column);
      for (int i = 1; i < kVecs; ++i) block += v[i] * load(x + column + i * W);
      acc[0][0] += block * factor;
    } else {
      for (int i = 0; i < kVecs; ++i) {
        v[i] *= factor;
        for (int token = 0; token < Tokens; ++token)
          acc[i % kSums][token] += v[i] * load(x + token * columns + column + i * W);
      }
    }
  }
  for (int token = 0; token < Tokens; ++token) {
    F total = acc[0][token];
    for (int i = 1; i < kSums; ++i) total += acc[i][token];
    const float value = sum(total) * (1.0f / kDecodedUnit);
    out[token * out_stride] = nan_seen(watch) ? std::numeric_limits<float>::quiet_NaN() : value;
  }
}

using DotRow = void (*)(const uint8_t*, const uint8_t*, const float*, int64_t, float*, int64_t);
constexpr DotRow kDotRow[kDotTokens + 1] = {
    nullptr, dot_row<1>, dot_row<2>, dot_row<3>, dot_row<4>, dot_row<5>, dot_row<6>, dot_row<7>, dot_row<8>};

constexpr int64_t kDepth = W == 16 ? 128 : 256;    // columns of a weight tile: three panels of it fit L1
constexpr int64_t kTileStride = kDepth + kLine / 4;  // of a tile's rows; not a power of two, for the cache's sets

// `Rows_` weight rows times `Panels` panels: c[r][panel * W ..] (+)= sum over depth of a[r][d] * b[panel][d].
template <int Rows_, int Panels>
void multiply(const float* a, const float* b, int64_t panel_stride, int64_t depth, float* c, int64_t c_stride, bool add) {
  F acc[Rows_][Panels];
  for (int r = 0; r < Rows_; ++r)
    for (int p = 0; p < Panels; ++p) acc[r][p] = add ? load(c + r * c_stride + p * W) : F{};
  for (int64_t d = 0; d < depth; ++d) {
    F v[Panels];
    for (int p = 0; p < Panels; ++p) v[p] = load(b + p * panel_stride + d * W);
    for (int r = 0; r < Rows_; ++r) {
      const F factor = splat(a[r * kTileStride + d]);
      for (int p = 0; p < Panels; ++p) acc[r][p] += factor * v[p];
    }
  }
  for (int r = 0; r < Rows_; ++r)
    for (int p = 0; p < Panels; ++p) store(c + r * c_stride + p * W, acc[r][p]);
}

// A tile of weight rows in two runs of `half` rows, as w1's gate and up rows are.
struct WeightTile {
  const uint8_t *data[2], *scale[2];
  int64_t half, columns;
  const uint8_t* row(int64_t r) const { return data[r / half] + r % half * columns; }
  const uint8_t* row_scale(int64_t r) const { return scale[r / half] + r % half * (columns / kBlock); }
};

// The tile times `panels` panels of `b`: c[2 * half][panels * W], by way of fp32 copies of kDepth columns in `a`.
void multiply_tile(const WeightTile& tile, const float* b, int64_t panels, float* a, float* c) {
  const int64_t rows = 2 * tile.half, c_stride = panels * W, panel_stride = tile.columns * W;
  for (int64_t first = 0; first < tile.columns; first += kDepth) {
    const int64_t depth = std::min(kDepth, tile.columns - first);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* data = tile.row(r) + first;
      const uint8_t* scale = tile.row_scale(r) + first / kBlock;
      for (int64_t d = 0; d < depth; d += kBlock) {
        F v[kVecs];
        dequantize_block(data + d, scale[d / kBlock], v);
        for (int i = 0; i < kVecs; ++i) store(a + r * kTileStride + d + i * W, v[i]);
      }
    }
    const auto multiply_panels = [&](auto kernel, int64_t step, int64_t panel) {
      for (int64_t r = 0; r < rows; r += step)  // rows is a multiple of 32
        kernel(
            a + r * kTileStride, b + first * W + panel * panel_stride, panel_stride, depth,
            c + r * c_stride + panel * W, c_stride, first > 0);
    };
    constexpr int kRows = W == 16 ? 8 : 4;  // with three panels: what the registers hold
    int64_t panel = 0;
    for (; panel + 3 <= panels; panel += 3) multiply_panels(multiply<kRows, 3>, kRows, panel);
    if (panels - panel == 2) multiply_panels(multiply<4, 2>, 4, panel);
    if (panels - panel == 1) multiply_panels(multiply<8, 1>, 8, panel);
  }
}

void gate_up(const Plan& plan, const TokenBlock& block, int64_t tile_index, float* scratch) {
  const Group& group = *block.group;
  const int64_t hidden = plan.hidden, intermediate = plan.intermediate, scale_columns = hidden / kBlock;
  const int64_t column = tile_index * kBlock, count = block.end - block.begin;
  const int64_t gate_row = group.expert * 2 * intermediate + column, up_row = gate_row + intermediate;
  const WeightTile tile{
      {plan.w1 + gate_row * hidden, plan.w1 + up_row * hidden},
      {plan.w1_scale + gate_row * scale_columns, plan.w1_scale + up_row * scale_columns},
      kBlock,
      hidden};
  const float* weights = plan.route_weights.data() + group.first + block.begin;
  const bool mxfp8 = plan.activation_dtype == ActivationDtype::mxfp8;
  float bias[2 * kBlock];
  load_bias(plan.w1_bias, gate_row, kBlock, bias);
  load_bias(plan.w1_bias, up_row, kBlock, bias + kBlock);

  if (group.in_rows()) {
    float* c = scratch;  // [count][64]
    for (int64_t r = 0; r < 2 * kBlock; ++r)
      kDotRow[count](tile.row(r), tile.row_scale(r), group.x, hidden, c + r, 2 * kBlock);
    for (int64_t token = 0; token < count; ++token, c += 2 * kBlock) {
      const F weight = splat(plan.weight_on_input ? weights[token] : 1.0f);
      F h[kVecs];
      for (int i = 0; i < kVecs; ++i) {
        const F gate = (load(c + i * W) + load(bias + i * W)) * weight;
        const F up = (load(c + kBlock + i * W) + load(bias + kBlock + i * W)) * weight;
        h[i] = swiglu(plan, gate, up);
        if (!mxfp8) h[i] = round_bf16(h[i]);
      }
      if (mxfp8) round_block(h);
      for (int i = 0; i < kVecs; ++i) store(group.h + token * intermediate + column + i * W, h[i]);
    }
    return;
  }

  float* a = scratch;
  float* c = scratch + kTileRows * kTileStride;  // [64][panels * W]
  const int64_t panels = (count + W - 1) / W, c_stride = panels * W;
  multiply_tile(tile, group.x + block.begin * hidden, panels, a, c);
  for (int64_t panel = 0; panel < panels; ++panel) {
    float lane_weights[W];
    for (int i = 0; i < W; ++i) lane_weights[i] = plan.weight_on_input && panel * W + i < count ? weights[panel * W + i] : 1.0f;
    const F weight = load(lane_weights);
    float* h = group.h + (block.begin + panel * W) * intermediate + column * W;
    I largest = {};
    for (int64_t j = 0; j < kBlock; ++j) {
      const F gate = (load(c + j * c_stride + panel * W) + bias[j]) * weight;
      const F up = (load(c + (kBlock + j) * c_stride + panel * W) + bias[kBlock + j]) * weight;
      const F value = swiglu(plan, gate, up);
      largest = max_bits(largest, magnitude_bits(value));
      store(h + j * W, mxfp8 ? value : round_bf16(value));
    }
    if (!mxfp8) continue;
    int32_t lanes[W];
    float inverse[W], scale[W];
    __builtin_memcpy(lanes, &largest, sizeof(largest));
    for (int i = 0; i < W; ++i) {
      const int32_t byte = scale_byte(lanes[i], ScaleRounding::rceil);
      inverse[i] = inverse_scale(byte);
      scale[i] = kScaleTable[byte];
    }
    for (int64_t j = 0; j < kBlock; ++j) store(h + j * W, round_e4m3(load(h + j * W) * load(inverse)) * load(scale));
  }
}

void down(const Plan& plan, const TokenBlock& block, int64_t tile_index, float* scratch) {
  const Group& group = *block.group;
  const int64_t hidden = plan.hidden, intermediate = plan.intermediate, scale_columns = intermediate / kBlock;
  const int64_t column = tile_index * kTileRows, count = block.end - block.begin;
  const int64_t rows = std::min(kTileRows, hidden - column), half = rows / 2;
  const int64_t first_row = group.expert * hidden + column;
  const WeightTile tile{
      {plan.w2 + first_row * intermediate, plan.w2 + (first_row + half) * intermediate},
      {plan.w2_scale + first_row * scale_columns, plan.w2_scale + (first_row + half) * scale_columns},
      half,
      intermediate};
  const int64_t* routes = plan.routes.data() + group.first + block.begin;
  const float* weights = plan.route_weights.data() + group.first + block.begin;
  float bias[kTileRows];
  load_bias(plan.w2_bias, first_row, rows, bias);

  if (group.in_rows()) {
    float* c = scratch;  // [count][rows]
    for (int64_t r = 0; r < rows; ++r)
      kDotRow[count](tile.row(r), tile.row_scale(r), group.h, intermediate, c + r, rows);
    for (int64_t token = 0; token < count; ++token, c += rows) {
      const float weight = plan.weight_on_input ? 1.0f : weights[token];
      float* term = plan.terms + routes[token] * hidden + column;
      for (int64_t r = 0; r < rows; ++r) term[r] = (c[r] + bias[r]) * weight;
    }
    return;
  }

  float* a = scratch;
  float* c = scratch + kTileRows * kTileStride;
  const int64_t panels = (count + W - 1) / W, c_stride = panels * W;
  multiply_tile(tile, group.h + block.begin * intermediate, panels, a, c);
  for (int64_t token = 0; token < count; ++token) {
    const float weight = plan.weight_on_input ? 1.0f : weights[token];
    float* term = plan.terms + routes[token] * hidden + column;
    for (int64_t r = 0; r < rows; ++r) term[r] = (c[r * c_stride + token] + bias[r]) * weight;
  }
}

void reduce(const Plan& plan, int64_t token) {
  const int64_t hidden = plan.hidden, topk = plan.topk;
  char* out = plan.out + (plan.first_token + token) * plan.out_stride * size_of(plan.out_kind);
  for (int64_t column = 0; column < hidden; column += kBlock) {
    F v[kVecs] = {};
    for (int64_t slot = 0; slot < topk; ++slot) {
      if (!plan.slot_used[token * topk + slot]) continue;
      const float* term = plan.terms + (token * topk + slot) * hidden + column;
      for (int i = 0; i < kVecs; ++i) v[i] += load(term + i * W);
    }
    store_block(out + column * size_of(plan.out_kind), plan.out_kind, v);
  }
}

}  // namespace
}  // namespace MXFP8MOE_ISA

const Kernels MXFP8MOE_TABLE = {
#define MXFP8MOE_STRING_(name) #name
#define MXFP8MOE_STRING(name) MXFP8MOE_STRING_(name)
    MXFP8MOE_STRING(MXFP8MOE_ISA),
    MXFP8MOE_ISA::W,
    MXFP8MOE_ISA::quantize_row,
    MXFP8MOE_ISA::dequantize_row,
    MXFP8MOE_ISA::pack,
    MXFP8MOE_ISA::gate_up,
    MXFP8MOE_ISA::down,
    MXFP8MOE_ISA::reduce,
    size_t(kTileRows * (MXFP8MOE_ISA::kTileStride + kChunkTokens)),
};

}  // namespace mxfp8moe::cpu
