#include "arena.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <limits>
#include <sstream>

#include "../error.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U  // Linux 6.3; hosts with vm.memfd_noexec=2 ask for it
#endif

namespace dpcomm {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

std::string mib(uint64_t bytes) {
  const uint64_t tenths = bytes / (1u << 20) * 10 + bytes % (1u << 20) * 10 / (1u << 20);
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " MiB";
}

Error refusal(size_t bytes, const std::string& why, int errnum) {
  return resource_error("cannot get " + mib(bytes) + " of shared memory (" + why + "; or set DPCOMM_ARENA_MB lower)",
                        errnum);
}

// ---- How much memory there is to be had -----------------------------------------------------------------------------

// The names of the same things in both versions of cgroups.
struct Controller {
  const char *limit, *usage, *inactive, *active;
};
constexpr Controller kV1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
                            "total_active_file"};
constexpr Controller kV2 = {"memory.max", "memory.current", "inactive_file", "active_file"};

// The number behind `key` ("" : the first one) in a file of "key number" lines; false where there is none ("max").
bool read_number(const std::string& path, const std::string& key, uint64_t& value) {
  std::ifstream file(path);
  if (key.empty()) return static_cast<bool>(file >> value);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string word;
    if (words >> word && word == key) return static_cast<bool>(words >> value);
  }
  return false;
}

void look_at_group(const std::string& folder, const Controller& names, MemoryRoom& room) {
  uint64_t limit = 0, usage = 0, inactive = 0, active = 0;
  if (!read_number(folder + "/" + names.limit, "", limit)) return;
  if (!read_number(folder + "/" + names.usage, "", usage)) return;
  if (limit >= uint64_t{1} << 60) return;  // version 1 writes "none" as 2^63 less a page
  read_number(folder + "/memory.stat", names.inactive, inactive);
  read_number(folder + "/memory.stat", names.active, active);
  // Page cache counts as usage and is given back on demand: without this every container that has read its data set
  // would look full.
  const uint64_t held = usage - std::min(usage, inactive + active);
  const uint64_t left = limit - std::min(limit, held);
  if (left < room.bytes) room = {left, folder + "/" + names.limit};
}

// This process's group of that controller, as /proc/self/cgroup has it; false where it is in none.
bool own_group(const std::string& root, const Controller& names, std::string& path) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool ours = &names == &kV2 ? controllers == ",," : controllers.find(",memory,") != std::string::npos;
    if (!ours) continue;
    path = line.substr(second + 1);
    return true;
  }
  return false;
}

// Visits the group and all above it: any of them can be the one that is full.
void look_at_hierarchy(const std::string& root, const Controller& names, const std::string& mounted,
                       const std::string& mount_point, MemoryRoom& room) {
  std::string path;
  if (!own_group(root, names, path)) return;
  // A container may see only its own part of the tree: `mounted` is then the beginning of `path`.
  if (mounted != "/" && (path + "/").compare(0, mounted.size() + 1, mounted + "/") == 0) path.erase(0, mounted.size());
  if (path.find("..") != std::string::npos) path.clear();  // outside of our cgroup namespace
  while (!path.empty() && path.back() == '/') path.pop_back();
  for (;;) {
    look_at_group(root + mount_point + path, names, room);
    if (path.empty()) return;
    const size_t slash = path.rfind('/');
    path.resize(slash == std::string::npos ? 0 : slash);
  }
}

}  // namespace

MemoryRoom memory_room(const std::string& system_root) {
  MemoryRoom room = {kNoLimit, ""};
  uint64_t available_kib = 0, swap_kib = 0;
  if (read_number(system_root + "/proc/meminfo", "MemAvailable:", available_kib)) {
    read_number(system_root + "/proc/meminfo", "SwapFree:", swap_kib);
    room = {(available_kib + swap_kib) * 1024, system_root + "/proc/meminfo"};
  }
  std::ifstream mounts(system_root + "/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {  // id parent device root point options... - type source options
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream left(line.substr(0, dash)), right(line.substr(dash + 3));
    std::string skipped, mounted, point, type, source, options;
    left >> skipped >> skipped >> skipped >> mounted >> point;
    right >> type >> source >> options;
    const bool v1 = type == "cgroup" && ("," + options + ",").find(",memory,") != std::string::npos;
    if (v1 || type == "cgroup2") look_at_hierarchy(system_root, v1 ? kV1 : kV2, mounted, point, room);
  }
  return room;
}

// ---- Getting it -----------------------------------------------------------------------------------------------------

namespace {

// Beyond RLIMIT_FSIZE the system sends SIGXFSZ, which kills: ask first.
void check_file_size_limit(size_t bytes) {
  rlimit limit{};
  if (getrlimit(RLIMIT_FSIZE, &limit) != 0) throw resource_error("getrlimit(RLIMIT_FSIZE)", errno);
  if (bytes > size_t(std::numeric_limits<off_t>::max())) throw refusal(bytes, "no file is that long", EFBIG);
  if (limit.rlim_cur == RLIM_INFINITY || bytes <= limit.rlim_cur) return;
  throw refusal(bytes, "RLIMIT_FSIZE allows " + mib(limit.rlim_cur) + ": raise it with ulimit -f", EFBIG);
}

// The out-of-memory killer, not an error, is what a full cgroup or machine answers with: ask first.
void check_memory(size_t bytes, size_t still_needed, const std::string& system_root) {
  const MemoryRoom room = memory_room(system_root);
  if (still_needed <= room.bytes) return;
  throw refusal(bytes, mib(room.bytes) + " left under " + room.limit + ": free memory or raise that limit", ENOMEM);
}

// fallocate undoes its work when a signal arrives: under a profiler's timer it might never end. Signals wait meanwhile.
int fallocate_undisturbed(int fd, off_t offset, off_t length) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int failed;
  do failed = ::fallocate(fd, 0, offset, length) == 0 ? 0 : errno;
  while (failed == EINTR);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return failed;
}

// In steps, and looking at what is left before each: ranks that do this at the same time see each other's share and one
// of them stops before all of them together have reached the limit.
void allocate(int fd, size_t bytes, const std::string& system_root) {
  constexpr size_t kStep = 8u << 20;  // 2-3 ms of zeroing
  for (size_t done = 0; done < bytes; done += std::min(kStep, bytes - done)) {
    check_memory(bytes, bytes - done, system_root);
    const int failed = fallocate_undisturbed(fd, off_t(done), off_t(std::min(kStep, bytes - done)));
    if (failed != 0) throw refusal(bytes, "fallocate stopped after " + mib(done) + ": free memory", failed);
  }
}

UniqueFd make_memfd() {
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  UniqueFd fd = UniqueFd::opened_by([&] {
    const int made = ::memfd_create("dpcomm-arena", flags | MFD_NOEXEC_SEAL);
    return made < 0 && errno == EINVAL ? ::memfd_create("dpcomm-arena", flags) : made;  // Linux before 6.3
  });
  if (!fd) throw resource_error("memfd_create", errno);
  return fd;
}

}  // namespace

Arena Arena::create(size_t bytes, const std::string& system_root) {
  check_file_size_limit(bytes);
  Arena arena;
  arena.bytes_ = bytes;
  arena.fd_ = make_memfd();
  allocate(arena.fd(), bytes, system_root);
  if (::fcntl(arena.fd(), F_ADD_SEALS, kSeals) != 0) throw resource_error("fcntl(F_ADD_SEALS)", errno);
  arena.map(MAP_SHARED);
  return arena;
}

Arena Arena::adopt(UniqueFd fd, size_t bytes) {
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals) {  // an unsealed one could be truncated under us: SIGBUS
    throw Error(Code::internal, "a peer's memory is not a sealed memfd");
  }
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) throw resource_error("fstat of a peer's memory", errno);
  if (uint64_t(status.st_size) != bytes) {
    throw Error(Code::internal,
                "a peer's memory has " + std::to_string(status.st_size) + " bytes instead of " + std::to_string(bytes));
  }
  Arena arena;
  arena.bytes_ = bytes;
  arena.fd_ = std::move(fd);
  arena.map(MAP_SHARED);
  return arena;
}

Arena Arena::anonymous(size_t bytes, const std::string& system_root) {
  check_memory(bytes, bytes, system_root);
  Arena arena;
  arena.bytes_ = bytes;
  arena.map(MAP_SHARED | MAP_ANONYMOUS);
  return arena;
}

Arena Arena::sparse(size_t bytes, size_t used, const std::string& system_root) {
  check_memory(used, used, system_root);
  Arena arena;
  arena.bytes_ = bytes;
  arena.map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
  return arena;
}

void Arena::map(int flags) {
  ForkHold hold;  // a child forked between the two calls would keep the mapping
  void* const at = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, fd_.get(), 0);
  if (at == MAP_FAILED) throw refusal(bytes_, "mmap failed: look at ulimit -v", errno);
  data_ = static_cast<char*>(at);
  generation_ = fork_generation();
  if (::madvise(at, bytes_, MADV_DONTFORK) != 0) throw resource_error("madvise(MADV_DONTFORK)", errno);
}

Arena::Arena(Arena&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      generation_(other.generation_) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(generation_, other.generation_);
  return *this;
}

Arena::~Arena() {
  if (data_ != nullptr && generation_ == fork_generation()) ::munmap(data_, bytes_);
}

}  // namespace dpcomm
