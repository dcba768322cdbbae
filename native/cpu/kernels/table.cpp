#include "../kernels.h"

#define MGM_CONCAT_(a, b) a##b
#define MGM_CONCAT(a, b) MGM_CONCAT_(a, b)
#define MGM_STRING_(a) #a
#define MGM_STRING(a) MGM_STRING_(a)

namespace mgm::cpu {

const Kernels& MGM_CONCAT(MGM_ISA, _kernels)() {
  static const Kernels table = {
      MGM_STRING(MGM_ISA),
#define MGM_ENTRY(name, Args) &MGM_ISA::name,
      MGM_OPS(MGM_ENTRY)
#undef MGM_ENTRY
          & MGM_ISA::packed_bytes,
      &MGM_ISA::fma_probe,
      &MGM_ISA::read_probe,
  };
  return table;
}

}  // namespace mgm::cpu
