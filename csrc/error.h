// The one exception of the C++ side. bindings.cpp turns it into the Python class of the same code, one to one.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dpcomm {

// The names are those in "[dpcomm:CODE]" and, in camel case, of the Python classes.
enum class Code {
  argument,
  unsupported,
  mismatch,
  peer_lost,
  timeout,
  aborted,
  resource,
  p2p,
  version,
  fork,
  internal,
  cuda
};

struct Error : std::runtime_error {
  Error(Code c, const std::string& what) : std::runtime_error(what), code(c) {}

  Code code;
  int rank = -1;                 // PEER_LOST: which peer
  std::vector<int> waiting_for;  // TIMEOUT: which ranks did not answer
  int errnum = 0;                // RESOURCE: errno; CUDA: its own number
};

// "PEER_LOST": the word in "[dpcomm:PEER_LOST]".
const char* name_of(Code code);

// "what: strerror(errnum)", for a system call that failed.
Error resource_error(const std::string& what, int errnum);

}  // namespace dpcomm
