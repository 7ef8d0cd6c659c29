// The text of a failed system call.
#include "error.h"

#include <cstring>

namespace dpcomm {

const char* name_of(Code code) {
  switch (code) {
    case Code::argument:
      return "ARGUMENT";
    case Code::unsupported:
      return "UNSUPPORTED";
    case Code::mismatch:
      return "MISMATCH";
    case Code::peer_lost:
      return "PEER_LOST";
    case Code::timeout:
      return "TIMEOUT";
    case Code::aborted:
      return "ABORTED";
    case Code::resource:
      return "RESOURCE";
    case Code::p2p:
      return "P2P";
    case Code::version:
      return "VERSION";
    case Code::fork:
      return "FORK";
    case Code::internal:
      return "INTERNAL";
    case Code::cuda:
      return "CUDA";
  }
  return "?";
}

Error resource_error(const std::string& what, int errnum) {
  char buffer[128];
  Error error(Code::resource, what + ": " + strerror_r(errnum, buffer, sizeof buffer));  // GNU's: returns the text
  error.errnum = errnum;
  return error;
}

}  // namespace dpcomm
