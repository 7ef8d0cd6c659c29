// GPUs: who they are, and which reach each other.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace dpcomm {

struct DeviceInfo {
  int ordinal = -1;
  std::string name, uuid, pci_bus_id, capability;  // "GPU-...", "0000:17:00.0", "9.0"
  int sms = 0;
};

std::string cuda_version();          // of the runtime that is linked in: "13.0"
std::string cuda_unusable_reason();  // "" where a device can be used
std::vector<DeviceInfo> cuda_devices();

int device_of(uintptr_t address);  // whose memory it is; -1: none's that the driver knows
void uuid_of(int device, uint8_t uuid[16]);
std::string text_of_uuid(const uint8_t uuid[16]);  // as nvidia-smi writes it
int device_with(const uint8_t uuid[16]);           // -1: none that this process sees
// Error(p2p) where the driver knows no way. Its word alone proves nothing: the engine moves data and looks.
void require_peer_access(int from, int to, int rank);
// The same, and opens the way; it makes a context on the other device. (Opening a handle does that without one.)
void enable_peer_access(int from, int to, int rank);

}  // namespace dpcomm
