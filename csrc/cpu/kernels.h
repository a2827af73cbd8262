// The kernels that exist once per instruction set, and the plain data they work on.
//
// Named dimensions: T tokens, H hidden size, I intermediate size, E local experts, K experts per token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace mxfp8moe::cpu {

constexpr int64_t kBlock = 32;      // values per E8M0 scale
constexpr int64_t kDotTokens = 8;   // groups of at most this many tokens keep their activations in rows
constexpr int64_t kChunkTokens = 336;  // tokens per work item: a multiple of every group of panels, their results stay in L2
constexpr int64_t kTileRows = 64;   // weight rows per work item (w1: 32 gate rows and their 32 up rows)
constexpr int64_t kLine = 64;       // bytes of a cache line, alignment of scratch

enum class Kind : int8_t { f32, bf16, f16, f64, e4m3 };
enum class ScaleRounding : int8_t { rceil, floor, ceil, even };
enum class ActivationDtype : int8_t { mxfp8, bf16 };

// A matrix whose rows lie `stride` elements apart.
struct Rows {
  const char* data = nullptr;
  int64_t stride = 0;
  Kind kind = Kind::f32;
};

// The tokens of one expert, `count` entries of Plan::routes from `first` on.
//
// Their activations lie at `x` ([H] per token) and, between the two products, at `h` ([I] per token): as rows of fp32
// if there are at most kDotTokens of them, else as panels [ceil(count / width)][H or I][width] of fp32, where width is
// the vector width and the lanes past `count` are zero.
struct Group {
  int64_t expert;
  int64_t first;
  int64_t count;
  float* x;
  float* h;

  bool in_rows() const { return count <= kDotTokens; }
};

// Tokens [begin, end) of a group; such a block and a tile of weight rows make a work item of the products.
struct TokenBlock {
  const Group* group;
  int64_t begin, end;
};

// The arguments of one call, checked; pointers into CPU memory.
struct FusedMoe {
  int64_t tokens, hidden, intermediate, experts, global_experts, topk;
  Rows hidden_states;
  const uint8_t* hidden_states_scale;  // or null
  int64_t hidden_states_scale_stride;
  const uint8_t *w1, *w1_scale, *w2, *w2_scale;
  Rows topk_weights;
  const char* topk_ids;
  int64_t topk_ids_stride;
  bool ids_are_64_bit;
  Rows w1_bias, w2_bias;      // data is null if there is none
  const int32_t* expert_map;  // or null
  std::optional<int32_t> num_tokens;
  float alpha, beta;
  float limit;  // +inf if there is none
  bool weight_on_input;
  ActivationDtype activation_dtype;
  char* out;
  int64_t out_stride;
  Kind out_kind;
};

// A call, and how a part of its tokens is served.
struct Plan : FusedMoe {
  explicit Plan(const FusedMoe& call) : FusedMoe(call) {}

  int64_t first_token = 0;           // of the part: routes and terms count tokens from here
  std::vector<int64_t> routes;       // token * K + slot, grouped by expert
  std::vector<float> route_weights;  // of the same routes
  std::vector<int32_t> slot_used;    // [T, K]: whether the route adds something
  std::vector<Group> groups;
  std::vector<TokenBlock> blocks;
  float* terms = nullptr;            // [T * K, H], weighted results of the routes
};

struct Kernels {
  const char* name;
  int64_t width;  // fp32 values per vector

  // x: C values -> data [C], scale [C / 32]
  void (*quantize_row)(const char* x, Kind kind, ScaleRounding rounding, int64_t columns, uint8_t* data, uint8_t* scale);
  // data [C], scale [C / 32] -> out: C values
  void (*dequantize_row)(const uint8_t* data, const uint8_t* scale, int64_t columns, char* out, Kind kind);
  // Quantised or rounded activations of a block of up to `width` tokens, which starts at a multiple of it, into Group::x.
  void (*pack)(const Plan& plan, const TokenBlock& block);
  // 32 intermediate columns, tile `tile`, for a block of tokens: first product, SwiGLU, rounding, into Group::h.
  void (*gate_up)(const Plan& plan, const TokenBlock& block, int64_t tile, float* scratch);
  // Up to 64 hidden columns for a block of tokens: second product, routing weight, into Plan::terms.
  void (*down)(const Plan& plan, const TokenBlock& block, int64_t tile, float* scratch);
  // out[token] = sum of its terms, in the order of their slots.
  void (*reduce)(const Plan& plan, int64_t token);
  size_t scratch_floats;  // per thread, for gate_up and down
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// What this processor runs, the best first.
std::vector<const Kernels*> supported();
// The kernels in use: the best supported, or what the environment variable MXFP8MOE_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace mxfp8moe::cpu
