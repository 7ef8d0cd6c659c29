// The machine that is pretended, and the environment variable that describes it.
#include <cstdlib>
#include <sstream>

#include "state.h"

namespace stand_in {
namespace {

int whole(const std::string& key, const std::string& value, int least, int most) {
  char* end = nullptr;
  const long number = std::strtol(value.c_str(), &end, 10);
  if (value.empty() || *end || number < least || number > most)
    die("STAND_IN_MACHINE: %s=%s: expected a number from %d to %d", key.c_str(), value.c_str(), least, most);
  return static_cast<int>(number);
}

size_t choice(const std::string& key, const std::string& value, std::initializer_list<const char*> words) {
  std::string expected;
  for (size_t i = 0; i < words.size(); ++i) {
    if (value == words.begin()[i]) return i;
    expected += std::string(i ? "|" : "") + words.begin()[i];
  }
  die("STAND_IN_MACHINE: %s=%s: expected %s", key.c_str(), value.c_str(), expected.c_str());
}

void set_visible(Machine& m, const std::string& key, const std::string& value) {
  m.visible.clear();
  std::istringstream items(value);
  for (std::string item; std::getline(items, item, ':');) m.visible.push_back(whole(key, item, 0, kMostDevices - 1));
  m.devices = static_cast<int>(m.visible.size());
}

void set_capability(Machine& m, const std::string& key, const std::string& value) {
  const size_t dot = value.find('.');
  m.major = whole(key, value.substr(0, dot), 1, 99);
  m.minor = dot == std::string::npos ? 0 : whole(key, value.substr(dot + 1), 0, 9);
}

void set_peers(Machine& m, const std::string& key, const std::string& value) {
  const size_t which = choice(key, value, {"all", "none", "drop"});
  m.says = Machine::all(which != 1);
  m.holds = Machine::all(which == 0);
}

void set_driver(Machine& m, const std::string& key, const std::string& value) {
  const cudaError_t errors[] = {cudaSuccess, cudaErrorNoDevice, cudaErrorInsufficientDriver};
  m.driver = errors[choice(key, value, {"ok", "none", "old"})];
}

using Setter = void (*)(Machine&, const std::string& key, const std::string& value);

const std::map<std::string, Setter>& setters() {
  static const std::map<std::string, Setter> all = {
      {"devices", [](auto& m, auto& k, auto& v) { m.devices = whole(k, v, 0, kMostDevices); }},
      {"visible", set_visible},
      {"sms", [](auto& m, auto& k, auto& v) { m.sms = whole(k, v, 1, 1024); }},
      {"blocks_per_sm", [](auto& m, auto& k, auto& v) { m.blocks_per_sm = whole(k, v, 0, 32); }},
      {"capability", set_capability},
      {"memory_mib", [](auto& m, auto& k, auto& v) { m.memory_bytes = size_t(whole(k, v, 1, 1 << 20)) << 20; }},
      {"exit_deadline_s", [](auto& m, auto& k, auto& v) { m.exit_deadline_s = whole(k, v, 0, 3600); }},
      {"peers", set_peers},
      {"ipc",
       [](auto& m, auto& k, auto& v) {
         if (choice(k, v, {"ok", "fail"}) == 1) m.ipc_get = m.ipc_open = cudaErrorNotSupported;
       }},
      {"register",
       [](auto& m, auto& k, auto& v) {
         if (choice(k, v, {"ok", "fail"}) == 1) m.host_register = cudaErrorNotSupported;
       }},
      {"image", [](auto& m, auto& k, auto& v) { m.no_kernel_image = choice(k, v, {"ok", "none"}) == 1; }},
      {"driver", set_driver},
      {"imported",
       [](auto& m, auto& k, auto& v) { m.allow_free_while_imported = choice(k, v, {"die", "allow"}) == 1; }},
  };
  return all;
}

Machine* from_environment() {
  auto* m = new Machine;
  const char* text = std::getenv("STAND_IN_MACHINE");
  std::istringstream pairs(text ? text : "");
  for (std::string pair; std::getline(pairs, pair, ',');) {
    const size_t equals = pair.find('=');
    const std::string key = pair.substr(0, equals);
    const auto setter = setters().find(key);
    if (equals == std::string::npos || setter == setters().end())
      die("STAND_IN_MACHINE: '%s': no such key, or no value", pair.c_str());
    setter->second(*m, key, pair.substr(equals + 1));
  }
  return m;
}

}  // namespace

Machine::Matrix Machine::all(bool value) {
  Matrix m;
  for (auto& row : m) row.fill(value);
  for (size_t i = 0; i < m.size(); ++i) m[i][i] = true;
  return m;
}

Machine& machine() {
  static Machine* const only = from_environment();
  return *only;
}

int physical_device(int ordinal) {
  const Machine& m = machine();
  return m.visible.empty() ? ordinal : m.visible.at(static_cast<size_t>(ordinal));
}

}  // namespace stand_in
