"""The optimizer and the schedule take the steps of PyTorch's AdamW and transformers' schedules."""

import keras
import numpy as np
import pytest
from keras import ops

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from align_tf.training.optimization import AdamW, WarmupDecay  # noqa: E402

WARMUP, STEPS = 3, 12
SCHEDULES = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("decay", list(SCHEDULES))
def test_adamw_with_groups_and_schedule(decay):
    """A kernel at half the rate, a kernel at the whole, and a bias that does not decay."""
    rng = np.random.default_rng(0)
    start = {"low/kernel": (4, 3), "top/kernel": (3, 3), "top/bias": (3,)}
    start = {name: rng.normal(size=shape).astype("float32") for name, shape in start.items()}
    gradients = [
        {name: rng.normal(size=value.shape).astype("float32") for name, value in start.items()}
        for _ in range(STEPS)
    ]

    parameters = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start.items()}
    groups = [
        {"params": [parameters["low/kernel"]], "lr": 0.005, "weight_decay": 0.1},
        {"params": [parameters["top/kernel"]], "lr": 0.01, "weight_decay": 0.1},
        {"params": [parameters["top/bias"]], "lr": 0.01, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    schedule = SCHEDULES[decay](reference, WARMUP, STEPS)

    variables = {}
    for name, value in start.items():
        with keras.name_scope(name.split("/")[0]):
            variables[name] = keras.Variable(value, name=name.split("/")[1])
    optimizer = AdamW(WarmupDecay(0.01, WARMUP, STEPS, decay), weight_decay=0.1, epsilon=1e-8)
    optimizer.rates = {"low/kernel": 0.5}
    optimizer.build(list(variables.values()))

    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(step[name])
        reference.step()
        schedule.step()
        optimizer.apply([ops.convert_to_tensor(step[name]) for name in variables])
    for name, variable in variables.items():
        expected = parameters[name].detach().numpy()
        assert np.abs(expected - start[name]).max() > 0.01
        np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, atol=2e-6)
