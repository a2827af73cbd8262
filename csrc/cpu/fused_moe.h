// fused_moe on CPU tensors: routing, scratch memory and threads around the kernels.
#pragma once

#include "kernels.h"

#include <optional>

namespace mxfp8moe::cpu {

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
  std::optional<float> limit;
  bool weight_on_input;
  ActivationDtype activation_dtype;
  char* out;
  int64_t out_stride;
  Kind out_kind;
};

void fused_moe(const FusedMoe& call);

}  // namespace mxfp8moe::cpu
