// Small tables, filled when the library loads. They live apart from the kernels because code that runs at load time must
// not be compiled for an instruction set that the processor may lack.
#pragma once

#include <cstdint>
#include <cstring>

namespace mxfp8moe::cpu {

inline int32_t float_bits(float x) {
  int32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}
inline float bits_float(int32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

extern const float* const kDecodeTable;   // [256]: the value of an e4m3fn code
extern const float* const kScaleTable;    // [256]: 2^(byte - 127), NaN for 255
extern const int32_t* const kSlackTable;  // [255]: by exponent of amax / 448, formats.rceil_slack in Python tells of what

}  // namespace mxfp8moe::cpu
