// Finding NCCL: see dpcomm/nccl_library.py.
#include <pybind11/stl.h>

#include <tuple>

#include "bindings.h"
#include "nccl/library.h"
#if defined(DPCOMM_WITH_CUDA)
#include "nccl/engine.h"
#include "queue.h"
#endif

namespace py = pybind11;
using namespace dpcomm;

namespace {

std::tuple<std::string, std::string, std::string> find_nccl(const std::string& asked,
                                                            const std::vector<std::string>& wheels) {
  const nccl::Library& library = nccl::find_library({asked, wheels});
  return {nccl::version_text(library.version), library.path, library.how};
}

py::bytes unique_id() {
  const nccl::Library* library = nccl::found_library();
  if (!library) throw Error(Code::internal, "nccl_unique_id() comes after find_nccl()");
  nccl::UniqueId id;
  {
    const py::gil_scoped_release no_gil;
    const nccl::Result result = library->api.GetUniqueId(&id);
    if (result != nccl::Result::success) throw nccl_error(*library, "ncclGetUniqueId", result);
  }
  return {id.internal, sizeof id.internal};
}

#if defined(DPCOMM_WITH_CUDA)
struct NcclQueue : Queue {
  explicit NcclQueue(NcclEngine* made) : Queue(std::unique_ptr<Engine>(made)), nccl(*made) {}
  NcclEngine& nccl;
};

std::unique_ptr<NcclQueue> nccl_comm(int rank, int device, const NcclWish& wish, const std::vector<int>& pids,
                                     const std::vector<std::string>& hosts,
                                     const std::vector<std::pair<int, int>>& descriptors,
                                     const std::vector<std::vector<int>>& two_levels, int intra_codec) {
  std::vector<PeerSockets> sockets = own_sockets(descriptors);  // first of all: they are closed however this ends
  const nccl::Library* library = nccl::found_library();
  if (!library) throw Error(Code::internal, "NcclComm comes after find_nccl()");
  NcclHosts places{two_levels, CodecKind(intra_codec)};
  NcclEngine::Place place{rank, device, wish, {}, std::move(sockets), *library, std::move(places)};
  for (size_t r = 0; r < descriptors.size(); ++r) place.peers.push_back({pids.at(r), hosts.at(r)});
  const py::gil_scoped_release no_gil;
  return std::make_unique<NcclQueue>(NcclEngine::make(std::move(place)).release());
}

void connect(NcclQueue& queue, const std::string& unique_id, double timeout_s) {
  nccl::UniqueId id;
  if (unique_id.size() != sizeof id.internal)
    throw Error(Code::argument, "a unique id of NCCL has " + std::to_string(sizeof id.internal) + " bytes");
  unique_id.copy(id.internal, sizeof id.internal);
  interruptible([&](const auto& ask) { queue.nccl.connect(id, timeout_s, ask); });
}

void verify(NcclQueue& queue, double timeout_s, const std::string& name) {
  interruptible([&](const auto& ask) { queue.nccl.verify(timeout_s, name, ask); });
}

void add_comm(py::module_& m) {
  py::class_<NcclWish>(m, "NcclWish")
      .def(py::init([](int64_t scratch_bytes, int64_t slice_bytes, int max_ctas) {
             return NcclWish{scratch_bytes, slice_bytes, max_ctas};
           }),
           py::arg("scratch_bytes"), py::arg("slice_bytes") = 0, py::arg("max_ctas") = 0);
  py::class_<NcclQueue, Queue>(m, "NcclComm")
      .def(py::init(&nccl_comm), py::arg("rank"), py::arg("device"), py::arg("wish"), py::arg("pids"), py::arg("hosts"),
           py::arg("sockets"), py::arg("two_levels") = std::vector<std::vector<int>>(), py::arg("intra_codec") = 0)
      .def("connect", &connect, py::arg("unique_id"), py::arg("timeout_s"))
      .def("verify", &verify, py::arg("timeout_s"), py::arg("name"));
}
#else
void add_comm(py::module_&) {}
#endif

}  // namespace

void add_nccl(py::module_& m) {
  m.attr("NCCL_LEAST_VERSION") = nccl::version_text(nccl::kLeastVersion);
  m.def("find_nccl", &find_nccl, py::arg("asked"), py::arg("wheels"), py::call_guard<py::gil_scoped_release>());
  m.def("nccl_unique_id", &unique_id);
  add_comm(m);
}
