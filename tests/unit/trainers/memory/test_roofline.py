"""Numbers worked out by hand, and published trainings whose time is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunesmith.cluster.fleet import parse_fleet
from tunesmith.cluster.fleet_file import BUILT_IN, load_fleets
from tunesmith.trainers.memory.roofline import (
    LINKS,
    MEMORY,
    UTILISATION,
    Work,
    disk,
    flops_per_token,
    memory_bytes,
    optimizer_bytes,
    run_time,
    sent_bytes,
    step_time,
)

KNOWN = load_fleets(BUILT_IN)
A100, A100_8, A100_16 = (parse_fleet(text, KNOWN) for text in ("A100-80GB", "8xA100-80GB", "2x8xA100-80GB"))
FULL = Work(1e9, 1e9, 1e9, 1e9, layers=0, attention_width=0, context=0, tokens=1000)
LORA = replace(FULL, parameters=1.01e9, active=1.01e9, trainable=1e7, active_trainable=1e7)


def test_full_fine_tuning_costs_six_operations_a_parameter_and_token():
    assert flops_per_token(FULL) == 6e9


def test_a_frozen_base_costs_four_and_its_adapter_six():
    assert flops_per_token(LORA) == pytest.approx(4e9 + 6e7)


def test_gradient_checkpointing_adds_a_forward_pass():
    assert flops_per_token(replace(FULL, gradient_checkpointing=True)) == 8e9


def test_only_the_experts_that_a_token_meets_cost():
    mixture = replace(FULL, parameters=8e9, trainable=8e9)
    assert flops_per_token(mixture) == 6e9


def test_causal_attention_costs_half_of_palms_twelve():
    work = replace(FULL, layers=2, attention_width=64, context=100)
    assert flops_per_token(work) - 6e9 == 12 * 2 * 64 * 100 / 2
    again = replace(work, gradient_checkpointing=True)
    assert flops_per_token(again) - 8e9 == 16 * 2 * 64 * 100 / 2


def test_zero_sends_two_parameters_worth_below_stage_three_and_three_there():
    for stage in (0, 1, 2):
        assert sent_bytes(replace(FULL, zero_stage=stage), gpus=8) == 2 * 2e9 * 7 / 8
    assert sent_bytes(replace(FULL, zero_stage=3), gpus=8) == 3 * 2e9 * 7 / 8
    assert sent_bytes(replace(FULL, zero_stage=3), gpus=1) == 0


def test_more_passes_send_gradients_again_from_stage_two_on_and_weights_in_stage_three():
    four = replace(FULL, passes=4)
    assert sent_bytes(replace(four, zero_stage=1), 2) == 2 * 2e9 / 2
    assert sent_bytes(replace(four, zero_stage=2), 2) == 5 * 2e9 / 2
    assert sent_bytes(replace(four, zero_stage=3), 2) == 12 * 2e9 / 2


def test_a_frozen_base_is_sent_in_stage_three_alone():
    assert sent_bytes(replace(LORA, zero_stage=2), 2) == 2 * 2e7 / 2
    assert sent_bytes(replace(LORA, zero_stage=3), 2) == (2 * 2.02e9 + 2e7) / 2
    assert sent_bytes(replace(LORA, zero_stage=3, weight_bytes=0.516), 2) == (2 * 1.01e9 * 0.516 + 2e7) / 2


def test_memory_traffic_counts_weights_gradients_and_the_optimizer():
    assert memory_bytes(FULL, gpus=1) == 2 * 2e9 + 4e9 + 8e9
    assert memory_bytes(replace(FULL, zero_stage=2), gpus=8) == 2 * 2e9 + 4e9 + 1e9
    assert memory_bytes(replace(FULL, gradient_checkpointing=True, passes=2), gpus=1) == 2 * (3 * 2e9 + 4e9 + 8e9)
    assert memory_bytes(replace(LORA, weight_bytes=0.5), gpus=1) == 2 * 4.5 * 1.01e9 + 12e7
    assert optimizer_bytes(FULL, gpus=8) == 30e9
    assert optimizer_bytes(replace(FULL, zero_stage=1), gpus=8) == 30e9 / 8


def test_a_step_is_its_slowest_part_and_the_optimizer():
    step = step_time(FULL, A100)
    compute = 6e9 * 1000 / (312e12 * UTILISATION.usual)
    adam = 30e9 / (2039e9 * MEMORY.usual)
    assert step.pieces["compute"] == pytest.approx(compute)
    assert step.seconds == pytest.approx(compute + adam)
    assert step.low == pytest.approx(6e12 / (312e12 * 0.5) + 30e9 / (2039e9 * 0.9))
    assert step.high == pytest.approx(6e12 / (312e12 * 0.3) + (16e9 + 30e9) / (2039e9 * 0.6))


def test_what_binds_a_step_is_named():
    assert step_time(replace(FULL, tokens=100_000), A100).bound_by == "compute"
    assert step_time(replace(LORA, tokens=1), A100).bound_by == "memory"
    assert step_time(replace(FULL, zero_stage=3, passes=8), A100_16).bound_by == "communication"
    assert step_time(replace(FULL, tokens=1, offload_optimizer="cpu"), A100).bound_by == "optimizer"


def test_offload_moves_bytes_over_the_link_to_the_host():
    resting = replace(FULL, tokens=1, zero_stage=3, offload_optimizer="cpu", offload_weights="cpu")
    pieces = step_time(resting, A100_8).pieces
    gathered = sent_bytes(resting, 8) / (300e9 * LINKS.usual)
    assert pieces["communication"] == pytest.approx(gathered + 2 * 2e9 / 8 / (32e9 * LINKS.usual))
    assert pieces["optimizer"] == pytest.approx(4e9 / 8 / (32e9 * LINKS.usual) + 28e9 / 100e9)


def test_each_further_place_is_slower():
    places = [
        replace(FULL, zero_stage=3, offload_optimizer=place, offload_weights=place) for place in ("none", "cpu", "nvme")
    ]
    seconds = [step_time(work, A100_8).seconds for work in places]
    assert seconds == sorted(set(seconds))


def test_the_band_holds_the_estimate():
    for work in (FULL, LORA, replace(FULL, zero_stage=3, offload_optimizer="cpu", passes=4)):
        step = step_time(work, A100_16)
        assert step.low < step.seconds < step.high


@pytest.mark.parametrize(
    ("parameters", "table", "layers", "width", "gpu_hours"),
    [
        (6_738_415_616, 32000 * 4096, 32, 4096, 184_320),
        (68_976_648_192, 32000 * 8192, 80, 8192, 1_720_320),
    ],
    ids=["7B", "70B"],
)
def test_the_published_hours_of_llama_2_lie_in_the_band(
    parameters: int, table: int, layers: int, width: int, gpu_hours: int
):
    """Touvron et al. 2023, Tables 1 and 2: 2.0e12 tokens in batches of 4e6, context 4096, A100-80GB."""
    fleet = parse_fleet("125x8xA100-80GB", KNOWN)
    active = parameters - table
    work = Work(parameters, active, parameters, active, layers, width, 4096, tokens=4e6 / fleet.gpus, zero_stage=1)
    run = run_time(step_time(work, fleet), 500_000, fleet)
    hours = [seconds / 3600 * fleet.gpus for seconds in (run.low, run.seconds, run.high)]
    assert hours[0] < gpu_hours < hours[2]
    assert hours[1] == pytest.approx(gpu_hours, rel=0.15)


def test_the_published_operations_of_llama_3_405b_are_met():
    """Dubey et al. 2024: 3.8e25 operations for 15.6e12 tokens."""
    parameters, table = 405_853_388_800, 128256 * 16384
    work = Work(parameters, parameters - table, parameters, parameters - table, 126, 16384, 8192, tokens=1)
    assert flops_per_token(work) * 15.6e12 == pytest.approx(3.8e25, rel=0.05)


def test_a_run_costs_its_hours_times_the_price_of_all_gpus():
    step = step_time(FULL, A100_8)
    run = run_time(step, 1000, A100_8)
    assert run.seconds == pytest.approx(1000 * step.seconds)
    assert run.usd == pytest.approx(1000 * step.seconds / 3600 * 8 * 3.43)
    free = run_time(step, 1000, parse_fleet("8xRTX4090", KNOWN))
    assert (free.usd, free.usd_low, free.usd_high) == (None, None, None)


def test_disk_holds_what_is_trained_with_its_optimizer_and_the_one_being_written():
    full = disk(parameters=1e9, trainable=1e9, whole_model=True, save_total_limit=2)
    assert (full.checkpoint, full.artifact, full.peak) == (14e9, 2e9, 4 * 14e9 + 2e9)
    adapter = disk(parameters=1e9, trainable=1e6, whole_model=False, save_total_limit=1)
    assert (adapter.checkpoint, adapter.artifact, adapter.peak) == (14e6, 2e6, 3 * 14e6 + 2e6)
    assert disk(parameters=1e9, trainable=1e9, whole_model=True, save_total_limit=1, mixed=False).checkpoint == 12e9
    small = disk(parameters=1e9, trainable=1e9, whole_model=True, save_total_limit=1, moments=2)
    assert (small.checkpoint, small.peak) == (8e9, 3 * 8e9 + 2e9)
