// The generic binding of the contract: every op as a name, named parameters and a function over plain values.
#pragma once
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "runtime/tensor.h"

namespace mgm {

using Value =
    std::variant<std::monostate, Tensor, TensorList, double, bool, std::string, std::vector<int64_t>>;

struct OpParam {
  std::string name;
  std::string type;  // tensor, tensor?, tensor[], int, int[], float, bool, dtype, activation
};

struct Op {
  std::string name;
  std::vector<OpParam> params;
  std::function<std::vector<Tensor>(const std::vector<Value>&)> run;
};

// In the order of MGM_OPS. Checks of shapes and dtypes throw Error("INVALID_ARGUMENT") with the op's name in
// front.
const std::vector<Op>& op_table();

}  // namespace mgm
