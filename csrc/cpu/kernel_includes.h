// Everything that kernels_impl.h uses from elsewhere, included before an instruction set is chosen.
#pragma once

#include "kernels.h"
#include "tables.h"
#include "values.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
