// Asks the NCCL of the given path for a communicator of one rank and prints "CODE: what it said", or "made".
#include <cstdio>

#include "nccl/library.h"

using namespace dpcomm;
using namespace dpcomm::nccl;

namespace {

void make(const Library& library) {
  const auto must = [&](const char* function, Result result) {
    if (result != Result::success) throw nccl_error(library, function, result);
  };
  UniqueId id;
  must("ncclGetUniqueId", library.api.GetUniqueId(&id));
  Comm comm = nullptr;
  Config config;
  config.blocking = 1;
  must("ncclCommInitRankConfig", library.api.CommInitRankConfig(&comm, 1, id, 0, &config));
  must("ncclCommDestroy", library.api.CommDestroy(comm));
}

}  // namespace

int main(int, char** arguments) {
  try {
    make(find_library({arguments[1], {}}));
    std::puts("made");
  } catch (const Error& error) {
    std::printf("%s: %s\n", name_of(error.code), error.what());
  }
}
