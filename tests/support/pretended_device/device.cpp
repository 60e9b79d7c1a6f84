// A pretended accelerator for a CPU-only PyTorch: `start` makes torch believe in a device of type "cuda", "xpu" or "mps".
//
// It registers an allocator, a device guard with streams and events, generators, pinned memory and kernels under the
// real dispatch key of the device type, which a build for CPUs leaves empty. See __init__.py for what is recorded.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/detail/XPUHooksInterface.h>
#include <pthread.h>
#include <pybind11/chrono.h>
#include <torch/csrc/utils/pybind.h>

#include "collectives.h"

C10_DECLARE_int(caffe2_log_level);

namespace pretended {
#define HOOKS                                                                                                \
  void init() const override {}                                                                              \
  bool isBuilt() const override { return true; }                                                             \
  bool isAvailable() const override {                                                                        \
    use();                                                                                                   \
    return true;                                                                                             \
  }                                                                                                          \
  bool hasPrimaryContext(DeviceIndex) const override { return true; }                                        \
  DeviceIndex deviceCount() const override { return devices; }                                               \
  DeviceIndex getCurrentDevice() const override { return pretended::current_device; }                        \
  void setCurrentDevice(DeviceIndex i) const override { Guard().setDevice(Device(kind, i)); }                \
  DeviceIndex exchangeDevice(DeviceIndex i) const override {                                                 \
    return Guard().exchangeDevice(Device(kind, i)).index();                                                  \
  }                                                                                                          \
  DeviceIndex maybeExchangeDevice(DeviceIndex i) const override { return exchangeDevice(i); }                \
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }                                    \
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }                     \
  Device getDeviceFromPtr(void*) const override { return Device(kind, 0); }                                  \
  const at::Generator& getDefaultGenerator(DeviceIndex = -1) const override { return Dice::standard(); }     \
  at::Generator getNewGenerator(DeviceIndex i = -1) const override {                                         \
    return at::make_generator<Dice>(std::max<DeviceIndex>(i, 0));                                            \
  }

struct CudaHooks final : at::CUDAHooksInterface {
  HOOKS
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  int getNumGPUs() const override { return devices; }
  DeviceIndex current_device() const override { return pretended::current_device; }
  void deviceSynchronize(DeviceIndex i) const override { Guard().synchronizeDevice(i); }
};

struct MpsHooks final : at::MPSHooksInterface {
  HOOKS
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned = 13, unsigned = 0) const override { return true; }
  void deviceSynchronize() const override { Guard().synchronizeDevice(0); }
};

struct XpuHooks final : at::XPUHooksInterface {
  HOOKS
  bool hasXPU() const override { return true; }
  DeviceIndex getNumGPUs() const override { return devices; }
  DeviceIndex current_device() const override { return pretended::current_device; }
  void deviceSynchronize(DeviceIndex i) const override { Guard().synchronizeDevice(i); }
};

// torch may have made its hooks already, which say "not available", and cannot replace them: construct ours there.
template <class Ours, class Base>
void replace_hooks(const Base& standard) {
  static_assert(sizeof(Base) == sizeof(Ours));
  new (const_cast<Base*>(&standard)) Ours();
}

void start(const std::string& type, int number, int64_t pointer) {
  kind = c10::Device(type).type();
  devices = static_cast<DeviceIndex>(number);
  FLAGS_caffe2_log_level = 2;  // no warning that kernels of torch._foreach_* are registered a second time
  callback = reinterpret_cast<Callback>(pointer);
  if (kind == DeviceType::CUDA) replace_hooks<CudaHooks>(at::detail::getCUDAHooks());
  if (kind == DeviceType::MPS) replace_hooks<MpsHooks>(at::detail::getMPSHooks());
  if (kind == DeviceType::XPU) replace_hooks<XpuHooks>(at::detail::getXPUHooks());
  c10::SetAllocator(kind, &device_allocator);
  c10::impl::DeviceGuardImplRegistrar(kind, new Guard());
  register_kernels();
  pthread_atfork(nullptr, nullptr, [] { in_bad_fork = in_bad_fork || is_used; });
}
}  // namespace pretended

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace pretended;
  using Backend = c10::intrusive_ptr<c10d::Backend>;
  py::module_::import("torch._C._distributed_c10d");
  py::class_<Collectives, c10::intrusive_ptr<Collectives>, c10d::Backend>(m, "Collectives")
      .def_property_readonly("options", [](const c10::intrusive_ptr<Collectives>& self) { return self->options; })
      .def_property_readonly("is_nccl", [](const c10::intrusive_ptr<Collectives>& self) { return self->is_nccl; });
  m.def("collectives", [](const Backend& gloo, bool is_nccl, std::chrono::milliseconds timeout) {
    return c10::make_intrusive<Collectives>(gloo, is_nccl, timeout);
  });
  m.def("start", &start);
  m.def("use", [] {
    use();
    return true;
  });
  m.def("stop", [] { callback = nullptr; });
  m.def("launches", [] { return launches; });
  m.def("live_bytes", [] { return live_bytes; });
  m.def("peak_bytes", [] { return peak_bytes; });
  m.def("reset_peak", [] { peak_bytes = live_bytes; });
  m.def("resize_storage", [](const at::Tensor& t, int64_t bytes) {
    at::native::resize_bytes_cpu(t.storage().unsafeGetStorageImpl(), bytes);
  });
}
