"""Profiles beside each other: every row keeps its device, and ratios stay within a device."""

import pytest

from kvlib.report.results import OUT_OF_MEMORY, grid, sweep
from kvlib.report.side_by_side import recorded_profiles, side_by_side

CPU = dict(model="tiny", weights="trained-small", device="a CPU", dtype="float32")
GPU = dict(model="big", weights="random", device="a GPU", dtype="bfloat16")
MS = {"a CPU": {"v0": 40.0, "v1": 10.0, "v2": 20.0}, "a GPU": {"v1": 2.0, "v2": 1.0}}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Two devices in two profiles, and smoke; at 64 tokens times are half of those at 128."""
    monkeypatch.setenv("KVLIB_OUTPUT", str(tmp_path))

    def record(profile: str, about: dict, lost: tuple = ()) -> None:
        def measure(method: str, tokens: int) -> dict:
            if (method, tokens) in lost:
                raise MemoryError
            return {"tpot_ms": MS[about["device"]][method] * tokens / 128, "held_bytes": 2**20 * tokens}

        points = grid(method=list(MS[about["device"]]), tokens=[64, 128])
        sweep("01_latency", points, measure, about=about, profile=profile, rows="missing")

    record("laptop", CPU)
    record("smoke", CPU)
    return record


def test_one_profile_is_one_column(recorded):
    table = side_by_side("01_latency", "tpot_ms", "laptop", at="tokens")
    [where] = set(table.columns.get_level_values(0))
    assert where == "tiny, trained-small, float32, a CPU (laptop)"
    assert table[where, "TPOT (ms) at 128"].to_dict() == MS["a CPU"]
    assert table[where, "over v1"].to_dict() == {"v0": 4, "v1": 1, "v2": 2}


def test_two_devices_keep_their_rows_and_ratios_are_within_a_device(recorded):
    recorded("gpu", GPU)
    assert recorded_profiles("01_latency", "laptop") == ["laptop", "gpu"], "smoke's numbers mean nothing"
    assert recorded_profiles("01_latency", "smoke") == ["smoke", "gpu", "laptop"]
    table = side_by_side("01_latency", "tpot_ms", "laptop", at="tokens")
    cpu, gpu = dict.fromkeys(table.columns.get_level_values(0))
    assert "a CPU (laptop)" in cpu and "a GPU (gpu)" in gpu and "random" in gpu
    assert table[gpu, "TPOT (ms) at 128"].dropna().to_dict() == MS["a GPU"]
    assert table[gpu, "over v1"].dropna().to_dict() == {"v1": 1, "v2": 0.5} and table[cpu, "over v1"]["v2"] == 2


def test_one_profile_measured_on_two_devices_has_two_columns(recorded):
    recorded("laptop", GPU)
    table = side_by_side("01_latency", "held_bytes", "laptop", at="tokens")
    assert len(set(table.columns.get_level_values(0))) == 2
    assert (table.xs("Held (MiB) at 128", axis=1, level=1).loc["v1"] == 128).all()


def test_what_ran_out_of_memory_says_so(recorded):
    recorded("gpu", GPU, lost=[("v1", 128)])
    table = side_by_side("01_latency", "tpot_ms", "laptop", at="tokens")
    gpu = table.columns[-1][0]
    assert table[gpu, "TPOT (ms) at 128"]["v1"] == OUT_OF_MEMORY and table[gpu, "TPOT (ms) at 128"]["v2"] == 1.0
    assert table[gpu, "over v1"].isna().all(), "nothing to compare with"


def test_refuses_an_empty_table_and_quality_of_random_weights(recorded):
    with pytest.raises(ValueError, match="09_none: no profile has rows"):
        side_by_side("09_none", "tpot_ms", "laptop")
    sweep("q", [{"method": "v1"}], lambda method: {"perplexity": 9.0}, about=GPU, profile="gpu", rows="missing")
    with pytest.raises(ValueError, match="random weights"):
        side_by_side("q", "perplexity", "laptop")
