// The text of a failed system call.
#include "error.h"

#include <cstring>

namespace dpcomm {

Error resource_error(const std::string& what, int errnum) {
  char buffer[128];
  Error error(Code::resource, what + ": " + strerror_r(errnum, buffer, sizeof buffer));  // GNU's: returns the text
  error.errnum = errnum;
  return error;
}

}  // namespace dpcomm
