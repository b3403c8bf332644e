// The dtypes that the operators take.
#pragma once

#include <stdint.h>

namespace scalelong {

enum class Type { float32, bfloat16, float16 };

}  // namespace scalelong
