#include "tables.h"

#include <cmath>
#include <limits>

namespace mxfp8moe::cpu {
namespace {

struct Tables {
  float decode[256], scale[256];
  int32_t slack[255];

  Tables() {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      const float v = (code & 0x7F) == 0x7F ? nan
          : exponent                        ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7)
                                            : std::ldexp(mantissa / 8.0f, -6);
      decode[code] = code & 0x80 ? -v : v;
    }
    scale[0] = std::ldexp(1.0f, -127);
    for (int byte = 1; byte < 255; ++byte) scale[byte] = bits_float(byte << 23);
    scale[255] = nan;
    for (int exponent = 1; exponent < 255; ++exponent) {
      const int k = exponent - 127, distance = k >= 0 ? k : -k - 1;
      slack[exponent] = distance == 0 ? 0 : int32_t(std::ldexp(std::log(2.0) / 2, std::ilogb(double(distance))));
    }
    slack[0] = slack[1] / 2;
  }
};
const Tables kTables;

}  // namespace

const float* const kDecodeTable = kTables.decode;
const float* const kScaleTable = kTables.scale;
const int32_t* const kSlackTable = kTables.slack;

}  // namespace mxfp8moe::cpu
