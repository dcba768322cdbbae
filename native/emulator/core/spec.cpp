#include "../emulator.h"

namespace mgm::emulator {

// Limits as in the CUDA programming guide's table of technical specifications per compute capability.
DeviceSpec device_spec(int capability) {
  DeviceSpec s;
  s.major = capability / 10;
  s.minor = capability % 10;
  s.name = "MGM emulated sm_" + std::to_string(capability);
  switch (capability) {
    case 86:
      s.sm_count = 84;
      s.max_threads_per_sm = 1536;
      s.max_blocks_per_sm = 16;
      s.shared_per_block_optin = 99 << 10;
      s.shared_per_sm = 100 << 10;
      break;
    case 89:
      s.sm_count = 128;
      s.max_threads_per_sm = 1536;
      s.max_blocks_per_sm = 24;
      s.shared_per_block_optin = 99 << 10;
      s.shared_per_sm = 100 << 10;
      break;
    case 90:
      s.sm_count = 132;
      s.shared_per_block_optin = 227 << 10;
      s.shared_per_sm = 228 << 10;
      break;
    case 100:
      s.sm_count = 148;
      s.shared_per_block_optin = 227 << 10;
      s.shared_per_sm = 228 << 10;
      break;
    case 120:
      s.sm_count = 170;
      s.max_threads_per_sm = 1536;
      s.max_blocks_per_sm = 24;
      s.shared_per_block_optin = 99 << 10;
      s.shared_per_sm = 100 << 10;
      break;
    default:  // 80 and everything not listed
      break;
  }
  return s;
}

const char* report_name(ReportKind kind) {
  switch (kind) {
    case ReportKind::out_of_bounds:
      return "out_of_bounds";
    case ReportKind::misaligned:
      return "misaligned";
    case ReportKind::uninitialized_read:
      return "uninitialized_read";
    case ReportKind::use_after_free:
      return "use_after_free";
    case ReportKind::invalid_free:
      return "invalid_free";
    case ReportKind::leak:
      return "leak";
    case ReportKind::shared_race:
      return "shared_race";
    case ReportKind::divergent_barrier:
      return "divergent_barrier";
    case ReportKind::bad_mask:
      return "bad_mask";
    case ReportKind::deadlock:
      return "deadlock";
    case ReportKind::trap:
      return "trap";
    case ReportKind::assertion:
      return "assertion";
    case ReportKind::illegal_instruction:
      return "illegal_instruction";
    case ReportKind::invalid_launch:
      return "invalid_launch";
    case ReportKind::host_access:
      return "host_access";
    case ReportKind::api_misuse:
      return "api_misuse";
  }
  return "unknown";
}

}  // namespace mgm::emulator
