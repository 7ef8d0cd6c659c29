// Compiles where csrc/nccl/api.h declares what nccl.h does. tests/test_nccl_library.py compiles it with the header of
// the installed wheel, and with faults planted into a copy of api.h.
#include <nccl.h>

#include <cstddef>
#include <type_traits>

#include "nccl/api.h"

using namespace dpcomm::nccl;

// ---- values ----
static_assert(kLeastVersion == NCCL_VERSION(2, 18, 0));

static_assert(int(Result::success) == ncclSuccess);
static_assert(int(Result::unhandled_cuda_error) == ncclUnhandledCudaError);
static_assert(int(Result::system_error) == ncclSystemError);
static_assert(int(Result::internal_error) == ncclInternalError);
static_assert(int(Result::invalid_argument) == ncclInvalidArgument);
static_assert(int(Result::invalid_usage) == ncclInvalidUsage);
static_assert(int(Result::remote_error) == ncclRemoteError);
static_assert(int(Result::in_progress) == ncclInProgress);

static_assert(int(DataType::int8) == ncclInt8);
static_assert(int(DataType::uint8) == ncclUint8);
static_assert(int(DataType::int32) == ncclInt32);
static_assert(int(DataType::uint32) == ncclUint32);
static_assert(int(DataType::int64) == ncclInt64);
static_assert(int(DataType::uint64) == ncclUint64);
static_assert(int(DataType::float16) == ncclFloat16);
static_assert(int(DataType::float32) == ncclFloat32);
static_assert(int(DataType::float64) == ncclFloat64);
static_assert(int(DataType::bfloat16) == ncclBfloat16);

static_assert(int(RedOp::sum) == ncclSum);
static_assert(int(RedOp::prod) == ncclProd);
static_assert(int(RedOp::max) == ncclMax);
static_assert(int(RedOp::min) == ncclMin);
static_assert(int(RedOp::avg) == ncclAvg);

// ---- layouts ----
static_assert(sizeof(Result) == sizeof(ncclResult_t) && sizeof(DataType) == sizeof(ncclDataType_t));
static_assert(sizeof(RedOp) == sizeof(ncclRedOp_t));
static_assert(sizeof(UniqueId) == NCCL_UNIQUE_ID_BYTES && sizeof(UniqueId) == sizeof(ncclUniqueId));
static_assert(alignof(UniqueId) == alignof(ncclUniqueId));

constexpr ncclConfig_t kTheirs = NCCL_CONFIG_INITIALIZER;
constexpr Config kOurs;
static_assert(offsetof(Config, size) == offsetof(ncclConfig_t, size));
static_assert(offsetof(Config, magic) == offsetof(ncclConfig_t, magic));
static_assert(offsetof(Config, version) == offsetof(ncclConfig_t, version));
static_assert(offsetof(Config, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(std::is_same_v<decltype(Config::size), decltype(ncclConfig_t::size)>);
static_assert(std::is_same_v<decltype(Config::magic), decltype(ncclConfig_t::magic)>);
static_assert(std::is_same_v<decltype(Config::version), decltype(ncclConfig_t::version)>);
static_assert(std::is_same_v<decltype(Config::blocking), decltype(ncclConfig_t::blocking)>);
static_assert(alignof(Config) == alignof(ncclConfig_t) && sizeof(Config) <= sizeof(ncclConfig_t));
static_assert(sizeof(Config) < offsetof(Config, blocking) + sizeof(int) + alignof(Config));  // `blocking` is the last
static_assert(kOurs.size == sizeof(Config) && kTheirs.size == sizeof(ncclConfig_t));
static_assert(kOurs.magic == kTheirs.magic);
static_assert(kOurs.version == NCCL_VERSION(2, 14, 0));
static_assert(kOurs.blocking == kTheirs.blocking && kOurs.blocking == NCCL_CONFIG_UNDEF_INT);

// ---- signatures: theirs with our types in the places of theirs ----
template <class T>
struct Mapped {
  using Type = T;
};
template <>
struct Mapped<ncclResult_t> {
  using Type = Result;
};
template <>
struct Mapped<ncclDataType_t> {
  using Type = DataType;
};
template <>
struct Mapped<ncclRedOp_t> {
  using Type = RedOp;
};
template <>
struct Mapped<ncclUniqueId> {
  using Type = UniqueId;
};
template <>
struct Mapped<ncclConfig_t> {
  using Type = Config;
};
template <>
struct Mapped<std::remove_pointer_t<ncclComm_t>> {
  using Type = std::remove_pointer_t<Comm>;
};
template <class T>
struct Mapped<T*> {
  using Type = typename Mapped<T>::Type*;
};
template <class R, class... Arguments>
struct Mapped<R(Arguments...)> {
  using Type = typename Mapped<R>::Type(typename Mapped<Arguments>::Type...);
};

template <auto kFunction, class Ours>
constexpr bool kSame = std::is_same_v<typename Mapped<decltype(kFunction)>::Type, Ours>;

static_assert(kSame<&ncclGetVersion, decltype(Api::GetVersion)>);
static_assert(kSame<&ncclGetUniqueId, decltype(Api::GetUniqueId)>);
static_assert(kSame<&ncclCommInitRankConfig, decltype(Api::CommInitRankConfig)>);
static_assert(kSame<&ncclCommFinalize, decltype(Api::CommFinalize)>);
static_assert(kSame<&ncclCommDestroy, decltype(Api::CommDestroy)>);
static_assert(kSame<&ncclCommAbort, decltype(Api::CommAbort)>);
static_assert(kSame<&ncclCommGetAsyncError, decltype(Api::CommGetAsyncError)>);
static_assert(kSame<&ncclGetErrorString, decltype(Api::GetErrorString)>);
static_assert(kSame<&ncclGetLastError, decltype(Api::GetLastError)>);
static_assert(kSame<&ncclGroupStart, decltype(Api::GroupStart)>);
static_assert(kSame<&ncclGroupEnd, decltype(Api::GroupEnd)>);
static_assert(kSame<&ncclSend, decltype(Api::Send)>);
static_assert(kSame<&ncclRecv, decltype(Api::Recv)>);
static_assert(kSame<&ncclAllReduce, decltype(Api::AllReduce)>);
