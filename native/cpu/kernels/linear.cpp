// linear over packed weights: the arguments of one Gemm.
#include "gemm.h"

namespace mgm::cpu::MGM_ISA {

void linear(const LinearArgs& args, ThreadPool& pool) {
  Gemm g;
  set_weights(g, args.w);
  set_epilogue(g, args.bias, args.scale, args.residual, args.activation);
  g.rows = args.x.shape[0];
  g.x = args.x.f32();
  g.x_stride = args.x.strides[0];
  g.out = args.out.f32();
  g.out_stride = args.out.strides[0];
  gemm(&g, 1, pool);
}

}  // namespace mgm::cpu::MGM_ISA
