"""DeepSpeed's own settings: a JSON may say how to compute, and nothing else."""

import json
from types import SimpleNamespace

import pytest

from dsvlm.train.engine import ds_configs, read_ds_config


def read(path, zero: int = 2) -> dict:
    train = SimpleNamespace(ds_config=str(path), zero=zero, expert_parallel=False)
    return read_ds_config(SimpleNamespace(train=train))


@pytest.mark.parametrize("text, words", [
    ('{"communication_data_type": "bf16"}', ["'communication_data_type'", "the recipe decides"]),
    ('{"seq_parallel_communication_data_type": "bf16"}', ["'seq_parallel_communication_data_type'"]),
    ('{"zero_force_ds_cpu_optimizer": true}', ["'zero_force_ds_cpu_optimizer'", "the recipe decides"]),
    ('{"torch_autocast": {"enabled": true}}', ["'torch_autocast'", "the recipe decides"]),
    ('{"amp": {"enabled": true}}', ["'amp'", "the recipe decides"]),
    ('{"gradient_allreduce_op": "sum"}', ["'gradient_allreduce_op'", "the recipe decides"]),
    ('{"zero_optimization": {"stage": 2, "zero_quantized_gradients": true}}', ["'zero_quantized_gradients'", "other"]),
    ('{"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}', ["'zenflow'", "other weights"]),
    ('{"zero_optimisation": {"stage": 2}}', ["'zero_optimisation'", "did you mean 'zero_optimization'"]),
    ('{"curriculum_learning": {}}', ["'curriculum_learning'", "no setting of how to compute", "Known: zero_"]),
    ("[]", ["[]", "expected an object"]),
    ("null", ["null", "expected an object"]),
    ('{"zero_optimization": null}', ["'zero_optimization' to null", "expected an object"]),
    ('{"zero_optimization": 2}', ["'zero_optimization' to 2", "expected an object"]),
    ("{'stage': 2}", ["is not valid JSON"]),
    ("[" * 100_000, ["is not valid JSON"]),
    ('{"\udcff": 1}', ["is not valid JSON"]),
])  # fmt: skip
def test_refused_with_the_files_name(tmp_path, text, words):
    path = tmp_path / "ours.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="train.ds_config: .*ours.json") as error:
        read(path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("path", sorted(ds_configs().glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ones_pass(path):
    assert read(path, int(path.stem[4]))


@pytest.mark.parametrize("more", [{"wall_clock_breakdown": True}, {"zero_force_ds_cpu_optimizer": False}])
def test_how_to_compute_is_left_to_the_file(tmp_path, more):
    path, settings = tmp_path / "ours.json", {"zero_optimization": {"stage": 2}} | more
    path.write_text(json.dumps(settings))
    assert read(path) == settings
