// Engines whose messages a library of Python's carries: see dpcomm/carriers.py.
#include <pybind11/stl.h>

#include <tuple>

#include "bindings.h"
#include "cpu/carried_engine.h"
#include "cpu/shm_builder.h"
#include "queue.h"

namespace py = pybind11;
using namespace dpcomm;

namespace {

// A carrier that is written in Python (dpcomm/carriers.py). Its exchanges are called by the thread that serves the
// queue.
class PyCarrier final : public Carrier {
 public:
  explicit PyCarrier(py::object impl) : impl_(std::move(impl)) {}
  ~PyCarrier() override {
    const py::gil_scoped_acquire gil;
    impl_ = py::object();
  }

  int64_t exchange(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives) override {
    const int64_t ticket = next_++;
    const py::gil_scoped_acquire gil;
    try {
      impl_.attr("exchange")(ticket, tuples(sends), tuples(receives));
    } catch (py::error_already_set& error) {
      broken_ = error.what();
    }
    return ticket;
  }

  bool adds(Dtype dtype) const override {
    const py::gil_scoped_acquire gil;
    return impl_.attr("adds")(name_of(dtype)).cast<bool>();
  }

  int64_t add(const std::vector<Transfer>& ranges, Dtype dtype) override {
    const int64_t ticket = next_++;
    const py::gil_scoped_acquire gil;
    try {
      impl_.attr("add")(ticket, tuples(ranges), name_of(dtype));
    } catch (py::error_already_set& error) {
      broken_ = error.what();
    }
    return ticket;
  }

  Arrival wait(int64_t ticket, double timeout_s) override {
    if (!broken_.empty()) return {Arrival::Kind::broken, -1, broken_};
    const py::gil_scoped_acquire gil;
    try {
      const auto [kind, peer, text] = impl_.attr("wait")(ticket, timeout_s).cast<std::tuple<int, int, std::string>>();
      return {Arrival::Kind(kind), peer, text};
    } catch (py::error_already_set& error) {
      return {Arrival::Kind::broken, -1, error.what()};
    } catch (py::cast_error& error) {
      return {Arrival::Kind::broken, -1, error.what()};
    }
  }

  void abort() override { call("abort"); }
  void close() override { call("close"); }

 private:
  static py::list tuples(const std::vector<Transfer>& transfers) {
    py::list list;
    for (const Transfer& t : transfers)
      list.append(py::make_tuple(t.peer, reinterpret_cast<uintptr_t>(t.data), t.bytes));
    return list;
  }
  void call(const char* name) {
    const py::gil_scoped_acquire gil;
    try {
      impl_.attr(name)();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable(name);
    }
  }

  py::object impl_;
  int64_t next_ = 0;
  std::string broken_;  // why an exchange could not be started
};

// A queue that knows that its engine is carried.
struct CarriedQueue : Queue {
  explicit CarriedQueue(CarriedEngine* made) : Queue(std::unique_ptr<Engine>(made)), carried(*made) {}
  CarriedEngine& carried;
};

std::unique_ptr<CarriedQueue> carried(int rank, const CarriedWish& wish, const std::vector<int>& pids,
                                      const std::vector<std::string>& hosts,
                                      const std::vector<std::pair<int, int>>& sockets, py::object carrier,
                                      const std::string& simd, const std::string& engine, ShmBuilder* inside,
                                      const std::vector<std::vector<int>>& inside_hosts, int intra_codec) {
  std::vector<PeerSockets> plane = own_sockets(sockets);  // first of all
  std::vector<CarriedPeer> peers;
  for (size_t r = 0; r < sockets.size(); ++r) peers.push_back({pids.at(r), hosts.at(r)});
  std::unique_ptr<HostMemory> memory = inside ? inside->share(inside_hosts, CodecKind(intra_codec)) : nullptr;
  auto made = std::make_unique<CarriedEngine>(
      rank, wish, std::move(peers), std::make_unique<ControlPlane>(rank, std::move(plane)),
      std::make_unique<PyCarrier>(std::move(carrier)), isa(simd.c_str()), engine, std::move(memory));
  return std::make_unique<CarriedQueue>(made.release());
}

}  // namespace

void add_carried(py::module_& m) {
  m.attr("ARRIVALS") = [] {
    py::dict d;
    d["here"] = int(Arrival::Kind::here);
    d["late"] = int(Arrival::Kind::late);
    d["broken"] = int(Arrival::Kind::broken);
    return d;
  }();
  py::class_<CarriedWish>(m, "CarriedWish")
      .def(py::init([](int64_t scratch_bytes, int64_t slice_bytes) { return CarriedWish{scratch_bytes, slice_bytes}; }),
           py::arg("scratch_bytes"), py::arg("slice_bytes") = 0);
  py::class_<CarriedQueue, Queue>(m, "CarriedComm")
      .def(py::init(&carried), py::arg("rank"), py::arg("wish"), py::arg("pids"), py::arg("hosts"), py::arg("sockets"),
           py::arg("carrier"), py::arg("simd"), py::arg("engine"), py::arg("inside") = nullptr,
           py::arg("inside_hosts") = std::vector<std::vector<int>>{}, py::arg("intra_codec") = int(CodecKind::none))
      .def(
          "verify",
          [](CarriedQueue& q, double timeout_s, const std::string& name) { q.carried.verify(timeout_s, name); },
          py::arg("timeout_s"), py::arg("name"), py::call_guard<py::gil_scoped_release>())
      .def("serve", &Queue::serve, py::call_guard<py::gil_scoped_release>())
      .def(
          "wait_failed", [](CarriedQueue& q, double timeout_s) { return q.carried.wait_failed(timeout_s); },
          py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>());
}
