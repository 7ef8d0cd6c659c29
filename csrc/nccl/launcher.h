// Steps of a call (core/steps.h) as launches on the engine's stream: those between two pauses are one.
#pragma once
#include "engine.h"
#include "step_kernels.h"

namespace dpcomm {

class NcclEngine::Launcher final : public Stepper {
 public:
  Launcher(NcclEngine& engine, const Team& team, const Header& header, const BucketTable& bucket)
      : engine_(engine),
        kernel_(step_kernel(Dtype(header.dtype), CodecKind(header.codec), Algorithm(header.algorithm))),
        launch_{team, header, bucket, {}, 0, false, engine.memory_->nonfinite_groups.data()} {}

  void play(const Step& step, bool in_place) override {
    const bool to_peers = step.kind == Step::Kind::give || step.kind == Step::Kind::take;
    PeerSteps* const last = launch_.count > 0 ? &launch_.steps[launch_.count - 1] : nullptr;
    if (last && to_peers && last->step.kind == step.kind && last->step.slice == step.slice) {
      last->peers |= bit(step);
      return;
    }
    if (launch_.count == kMostPeerSteps || (last && launch_.in_place != in_place)) pause();
    launch_.in_place = in_place;
    launch_.steps[launch_.count++] = {step, to_peers ? bit(step) : 0};
  }
  void pause() override {
    if (launch_.count == 0) return;
    engine_.launch(kernel_, engine_.ctas_for(launch_), &launch_);
    launch_.count = 0;
  }

 private:
  static uint64_t bit(const Step& step) { return uint64_t{1} << step.peer; }

  NcclEngine& engine_;
  const void* const kernel_;
  StepLaunch launch_;
};

}  // namespace dpcomm
