"""Every committed profile: its plan is accepted, its contexts are within its models, and what it measures fits its GPU."""

import re

import pytest

from kvlib import plan, spec
from kvlib.cache.methods import METHODS
from kvlib.measure.loads import measure_load
from kvlib.measure.scale import published_spec
from kvlib.model import load
from kvlib.report.results import OUT_OF_MEMORY, sweep

PROFILES = plan.profile_names()
ON_GPU = [name for name in PROFILES if name not in ("laptop", "smoke")]


@pytest.fixture(scope="module")
def planned():
    """{profile: {notebook: all of its parameters}}"""
    defaults = plan.read_defaults()
    plans = {name: plan.make(defaults, [], plan.read_profile(name, defaults), {}, "recorded") for name in PROFILES}
    return {name: {nb: defaults[nb] | given for nb, given in made.items()} for name, made in plans.items()}


def dimensions(name: str) -> dict:
    if name not in load.PUBLISHED:
        pytest.skip(f"no published dimensions of {name} here")
    return load.PUBLISHED[name]


def bytes_needed(model: spec.ModelSpec, method: str, context: int, batch: int) -> int:
    """Weights, cache, workspace of a step, and twice the MLP of one piece of the prompt, all in 16 bits."""
    piece = 2 * 2 * model.mlp_matrices * model.mlp_hidden * 2**14
    return 2 * model.n_params + spec.predicted_bytes(model, method, batch, context) + piece


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_names_methods_that_exist_and_says_what_it_needs(planned, profile):
    for notebook, given in planned[profile].items():
        for name in ("methods", "served"):
            assert set(given.get(name, [])) <= set(METHODS), (notebook, name)
    description = plan.read_profile(profile, planned["laptop"]).description
    assert profile not in ON_GPU or re.search(r"GPU with \d+ GB", description) and re.search("hour", description)


@pytest.mark.parametrize("profile", ON_GPU)
def test_contexts_are_within_the_published_limits(planned, profile):
    for notebook, given in planned[profile].items():
        config = dimensions(given["model_name"])
        limit = config.get("max_position_embeddings", config.get("n_positions", 1024))
        lengths = [given.get(name, 0) for name in ("context_tokens", "quality_context", "fork_tokens", "middle_tokens")]
        lengths += [*given.get("totals", []), *given.get("contexts", []), *(context for context, _ in given.get("loads", []))]
        lengths += [72 * given.get("n_turns", 0)] if notebook == "06_stress" else []
        assert max(lengths) <= limit, notebook


@pytest.mark.parametrize("profile", ON_GPU)
def test_what_a_profile_measures_fits_its_gpu_or_some_of_its_methods_does(planned, profile):
    description = plan.read_profile(profile, planned["laptop"]).description
    memory = int(re.search(r"GPU with (\d+) GB", description)[1]) * 10**9
    given = planned[profile]["05_capacity"]
    model = published_spec(dimensions(given["model_name"]))
    for context, batch in given["loads"]:
        needed = [bytes_needed(model, method, context, batch) for method in given["served"]]
        assert min(needed) <= memory, f"{context} x {batch} is beyond every method"
        assert context * batch > 2**17 or max(needed) <= memory, f"{context} x {batch} should fit"
    rest = sum(spec.held_bytes(model, m, max(given["batches"]), given["context_tokens"]) for m in given["methods"])
    assert rest + bytes_needed(model, "v2", given["context_tokens"], max(given["batches"])) <= memory, "equal batches, in turns"
    assert 2 * 2 * model.n_params + given["budget_mib"] * 2**20 <= memory, "the search runs beside this process"


def test_a_load_has_every_column_and_one_that_does_not_fit_is_a_row(tiny_gpt2, tmp_path, monkeypatch):
    monkeypatch.setenv("KVLIB_OUTPUT", str(tmp_path))

    def measure(context_tokens: int, batch: int) -> dict:
        if batch == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 64.00 GiB")
        return measure_load(tiny_gpt2, "kivi-4", context_tokens, batch, n_steps=3, n_prefills=1)

    points = [dict(context_tokens=64, batch=batch) for batch in (1, 2, 3)]
    rows = sweep("loads", points, measure, about=tiny_gpt2.about(), profile="test", rows="missing")
    assert rows.status.tolist() == ["ok", OUT_OF_MEMORY, "ok"], "measuring goes on behind it"
    done = rows[rows.status == "ok"]
    assert (done.held_bytes == done.predicted_bytes).all() and (done.prefill_peak_bytes >= done.held_bytes).all()
    columns = ["ttft_ms", "tpot_ms", "tokens_per_s", "decode_peak_bytes"]
    assert (done[columns] > 0).all(axis=None) and rows[columns].iloc[1].isna().all()
    with pytest.raises(ValueError, match="expected points"):
        sweep("loads", [], measure, about=tiny_gpt2.about(), profile="test", rows="missing")
