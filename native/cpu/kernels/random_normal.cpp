// Normal numbers from Philox4x32-10 and Box-Muller (native/ops.h).
#include "../kernels.h"

namespace mgm::cpu::MGM_ISA {

void random_normal(const RandomNormalArgs&, ThreadPool&) {
  fail("[randomNormal] not there yet");
}

}  // namespace mgm::cpu::MGM_ISA
