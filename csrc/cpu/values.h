// Single values of any of the types that a tensor of weights or biases may have.
#pragma once

#include "kernels.h"
#include "tables.h"

#include <torch/headeronly/util/Half.h>

namespace mxfp8moe::cpu {

constexpr int64_t size_of(Kind kind) {
  return kind == Kind::f64 ? 8 : kind == Kind::f32 ? 4 : kind == Kind::e4m3 ? 1 : 2;
}

inline float load_scalar(const Rows& rows, int64_t index) {
  switch (rows.kind) {
    case Kind::f32: {
      float v;
      std::memcpy(&v, rows.data + 4 * index, 4);
      return v;
    }
    case Kind::bf16: {
      uint16_t v;
      std::memcpy(&v, rows.data + 2 * index, 2);
      return bits_float(int32_t(uint32_t(v) << 16));
    }
    case Kind::f16: {
      uint16_t v;
      std::memcpy(&v, rows.data + 2 * index, 2);
      return c10::detail::fp16_ieee_to_fp32_value(v);
    }
    default: {
      double v;
      std::memcpy(&v, rows.data + 8 * index, 8);
      return float(v);
    }
  }
}

}  // namespace mxfp8moe::cpu
