// What CUDA's errors mean to the caller of an engine.
#pragma once
#include <string>

#include "../error.h"

namespace dpcomm {

bool is_invalid_stream(const Error& error);
// The error's text; of what a kernel leaves behind for every later call of the process, that it was an earlier one.
std::string sticky_text(const Error& error);

}  // namespace dpcomm
