// See library.h. A copy is known by the dynamic linker's handle: dlopen() gives the same one for the same file (device
// and inode), whatever its name.
#include "library.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>

namespace dpcomm::nccl {
namespace {

constexpr const char* kName = "libnccl.so.2";
constexpr const char* kAdvice =
    "Install dpcomm[nccl-cu13] (CUDA 13) or dpcomm[nccl-cu12] (CUDA 12), or set DPCOMM_NCCL_LIBRARY to the path of a "
    "libnccl.so.2.";

struct Close {
  void operator()(void* handle) const { dlclose(handle); }
};
using Handle = std::unique_ptr<void, Close>;

struct Opened {
  Handle handle;
  std::string how;
};

Handle open_library(const std::string& path) { return Handle(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)); }
Handle loaded_library(const std::string& path) {
  return Handle(dlopen(path.c_str(), RTLD_NOLOAD | RTLD_NOW | RTLD_LOCAL));
}

std::string last_dl_error() {
  const char* text = dlerror();
  return text ? text : "no reason given";
}

std::string path_of(const Handle& handle) {
  const link_map* map = nullptr;
  return dlinfo(handle.get(), RTLD_DI_LINKMAP, &map) == 0 ? map->l_name : kName;
}

[[noreturn]] void refuse_asked(const std::string& asked, const std::string& why) {
  throw Error(Code::version, "DPCOMM_NCCL_LIBRARY=" + asked + ": " + why);
}

// `other` is loaded: asking for another file would give the process a second copy.
void must_be_same(const std::string& asked, const Handle& other) {
  struct stat unused{};
  if (stat(asked.c_str(), &unused) != 0) refuse_asked(asked, strerror(errno));
  if (loaded_library(asked) == other) return;
  refuse_asked(asked, "two different copies of NCCL: this process has loaded " + path_of(other) +
                          " already (PyTorch loads one). Unset DPCOMM_NCCL_LIBRARY, or name that file.");
}

Opened open_asked(const std::string& asked) {
  const Handle loaded = loaded_library(kName);
  if (loaded) must_be_same(asked, loaded);
  Handle handle = open_library(asked);
  if (!handle) refuse_asked(asked, last_dl_error());
  return {std::move(handle), "DPCOMM_NCCL_LIBRARY"};
}

Opened open_first(const Places& places) {
  if (!places.asked.empty()) return open_asked(places.asked);
  if (Handle handle = loaded_library(kName)) return {std::move(handle), "loaded already"};
  std::string tried;
  for (const std::string& path : places.wheels) {
    if (path.empty()) continue;
    if (Handle handle = open_library(path)) return {std::move(handle), "wheel"};
    tried += "; wheel: " + last_dl_error();
  }
  if (tried.empty()) tried = "; wheel: none is installed";
  if (Handle handle = open_library(kName)) return {std::move(handle), "system"};
  throw Error(Code::version, std::string("no NCCL was found. Tried: ") + kName + " of this process: none is loaded" +
                                 tried + "; system: " + last_dl_error() + ". " + kAdvice);
}

// Takes function by function from one copy and notes what it lacks.
struct Resolver {
  void* handle;
  std::string lacking;

  template <class Function>
  void operator()(const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (!function) lacking += (lacking.empty() ? "" : ", ") + std::string(name);
  }
};

void resolve_all(Resolver& resolve, Api& api) {
  resolve("ncclGetUniqueId", api.GetUniqueId);
  resolve("ncclCommInitRankConfig", api.CommInitRankConfig);
  resolve("ncclCommFinalize", api.CommFinalize);
  resolve("ncclCommDestroy", api.CommDestroy);
  resolve("ncclCommAbort", api.CommAbort);
  resolve("ncclCommGetAsyncError", api.CommGetAsyncError);
  resolve("ncclGetErrorString", api.GetErrorString);
  resolve("ncclGetLastError", api.GetLastError);
  resolve("ncclGroupStart", api.GroupStart);
  resolve("ncclGroupEnd", api.GroupEnd);
  resolve("ncclSend", api.Send);
  resolve("ncclRecv", api.Recv);
  resolve("ncclAllReduce", api.AllReduce);
}

Library resolved(const Opened& opened) {
  Library library;
  library.path = path_of(opened.handle);
  library.how = opened.how;
  const std::string where = " (" + library.path + ", " + library.how + ")";
  Resolver resolve{opened.handle.get(), {}};
  // First the version: an old library also lacks functions, and the version is what explains it.
  resolve("ncclGetVersion", library.api.GetVersion);
  if (!library.api.GetVersion)
    throw Error(Code::version, "not NCCL" + where + ": it has no ncclGetVersion. " + kAdvice);
  if (library.api.GetVersion(&library.version) != Result::success)
    throw Error(Code::version, "NCCL" + where + " does not say its version. " + kAdvice);
  const std::string name = "NCCL " + version_text(library.version) + where;
  if (library.version < kLeastVersion)
    throw Error(Code::version,
                name + " < " + version_text(kLeastVersion) + ", the least that dpcomm works with. " + kAdvice);
  resolve_all(resolve, library.api);
  if (!resolve.lacking.empty()) throw Error(Code::version, name + " lacks " + resolve.lacking + ". " + kAdvice);
  return library;
}

struct Found {
  Handle handle;
  Library library;
};

std::mutex finding;
std::atomic<const Found*> found{nullptr};  // never freed: threads may use the library until the process ends

Code code_of(Result result) {
  if (result == Result::unhandled_cuda_error) return Code::cuda;
  if (result == Result::system_error) return Code::resource;
  if (result == Result::remote_error) return Code::peer_lost;
  return Code::internal;  // also what newer libraries add
}

}  // namespace

const Library& find_library(const Places& places) {
  const std::lock_guard<std::mutex> one_at_a_time(finding);
  if (const Found* before = found.load(std::memory_order_relaxed)) {  // written under this lock
    if (!places.asked.empty()) must_be_same(places.asked, before->handle);
    return before->library;
  }
  Opened opened = open_first(places);
  Library library = resolved(opened);
  const auto* made = new Found{std::move(opened.handle), std::move(library)};
  found.store(made, std::memory_order_release);
  return made->library;
}

const Library* found_library() {
  const Found* made = found.load(std::memory_order_acquire);
  return made ? &made->library : nullptr;
}

std::string version_text(int version) {
  const int major = version < 10000 ? 1000 : 10000;  // four digits until 2.8
  return std::to_string(version / major) + "." + std::to_string(version % major / 100) + "." +
         std::to_string(version % 100);
}

Error nccl_error(const Library& library, const std::string& function, Result result, Comm comm) {
  const char* reason = library.api.GetLastError(comm);
  std::string text = function + ": " + library.api.GetErrorString(result);
  if (reason && *reason) text += std::string(": ") + reason;
  return Error(code_of(result), text);
}

}  // namespace dpcomm::nccl
