// fused_moe on CPU tensors: routing, scratch memory and threads around the kernels.
#pragma once

#include "kernels.h"

namespace mxfp8moe::cpu {

// Computes the call into its `out`.
void fused_moe(const FusedMoe& call);

}  // namespace mxfp8moe::cpu
