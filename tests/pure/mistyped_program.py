"""What a user may get wrong; each line says the kind of error that `mypy --strict` reports. See test_typing.py."""

import numpy as np
import torch

import cubn
import cubn.torch

x = np.ones((4, 3), np.float32)
t = torch.ones(4, 3)
state = cubn.BatchNormState(3)
y, saved = cubn.forward_train(x, state)

# arrays
cubn.forward([[1.0], [2.0]], state)  # error: type-var
cubn.forward(x, state, mask=[True, False])  # error: arg-type
cubn.normalize(x, cubn.moments(x), gamma=1.0)  # error: arg-type
cubn.moments([1.0, 2.0])  # error: arg-type
state.gamma = [1.0, 2.0, 3.0]  # error: assignment

# arguments in each other's place
cubn.forward(state, x)  # error: type-var arg-type
cubn.backward(saved, y)  # error: call-overload
cubn.update(state, x)  # error: arg-type
cubn.fold(x)  # error: arg-type

# options
cubn.forward(x, state, relu="no")  # error: arg-type
cubn.forward(x, state, reslu=True)  # error: call-arg
cubn.backward(y, saved, parameter_gradients="globl")  # error: call-overload
cubn.BatchNormState(3, dtype="float16")  # error: arg-type
cubn.BatchNormState(3, dtype=np.float16)  # error: arg-type
cubn.BatchNormState(3, momentum="0.1")  # error: arg-type
cubn.BatchNormState(3, running_variance="sample")  # error: arg-type
state.running_variance = "sample"  # error: assignment
cubn.moments(x, dtype="int8")  # error: arg-type
cubn.forward_train(x, state, comm=0)  # error: arg-type
cubn.forward_train_start(x, state)  # error: call-arg

# results
torch.relu(y)  # error: arg-type
torch.relu(cubn.forward_train(t, state))  # error: arg-type
torch.relu(cubn.backward(t, saved).dx)  # error: arg-type
torch.relu(cubn.forward(t, state, out=x))  # error: arg-type
dx, dgamma, dbeta = cubn.backward(y, saved)  # error: misc
print(cubn.backward(y, saved).dmean)  # error: attr-defined
saved.x = x  # error: misc

# modules
cubn.torch.BatchNorm2d(3)(x)  # error: arg-type
cubn.torch.BatchNormAddReLU2d(3)(t)  # error: call-arg
cubn.torch.BatchNorm2d(3, comm=0)  # error: arg-type
cubn.torch.LazyBatchNorm2d(3, True, "no")  # error: arg-type
cubn.torch.BatchNorm1d(3).frozen = "no"  # error: assignment
