"""Runs end to end: what is conserved, what follows by hand, and that the same run is the same bytes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsim
from kvsim.config import RunConfig, parse_settings, run_config
from kvsim.errors import ConfigError, KvsimError, PolicyError, ResultError, TraceError
from kvsim.replay import Replay, prepare
from kvsim.results import STEPS, TABLES, open_result
from kvsim.simulate import run
from kvsim.trace.access import Geometry, dense_trace

from .conftest import SIZES, random_source

ONLINE = [
    "random",
    "fifo",
    "lru",
    "lfu",
    "sieve",
    "streaming-llm(sink=2)",
    "h2o",
    "h2o-mask",
    "tova",
    "lazy-eviction(window=3)",
]


@pytest.mark.parametrize("policy", ["full", *ONLINE, "belady", "mass-oracle"])
@pytest.mark.parametrize("regime", ["lossy", "offload"])
def test_every_policy_runs_in_both_regimes(trace, policy, regime):
    r = run(
        trace,
        policy=policy,
        regime=regime,
        budget="50%",
        page_size=1,
        demand="theta" if regime == "offload" else "dense",
    )
    assert r.summary["decode_steps"] == 60
    assert 0 < r.recall <= 1 + 1e-6
    assert np.isfinite(r.steps["end_s"]).all() and (r.steps["end_s"] > r.steps["start_s"]).all()
    if policy == "full":
        assert r.recall == pytest.approx(1, abs=1e-6) and r.recurrence_loss == 0
        assert r.summary["fetched_host_bytes"] == r.summary["spilled_host_bytes"] == 0


def test_lossy_moves_no_bytes_and_offload_loses_nothing(trace):
    lossy = run(trace, policy="lru", budget="30%")
    assert lossy.summary["fetched_host_bytes"] == lossy.summary["spilled_host_bytes"] == 0
    assert lossy.steps["dropped_pages"].sum() > 0
    kept = run(trace, policy="lru", budget="30%", regime="offload", page_size=1)
    assert kept.recall == pytest.approx(1, abs=1e-6) and kept.steps["dropped_pages"].sum() == 0


def test_dense_offload_fetches_what_the_budget_cannot_hold(trace):
    """Dense demand reads every page in every step; what is over the budget is fetched each time, by hand."""
    r = run(trace, policy="lru", budget="10", regime="offload", page_size=1)
    page = 2 * 16 * 2.0  # keys and values, head_dim 16, two bytes
    lanes = 4
    expected = (
        sum(24 + t - 1 - 10 for t in range(1, 21)) * lanes * page * 3
    )  # three requests, 24 prompt tokens, 20 steps
    assert r.summary["fetched_host_bytes"] == expected
    # everything is used in every step, so the older pages leave; each is written once, the newest ten never
    assert r.summary["spilled_host_bytes"] == 34 * lanes * page * 3


@given(st.sampled_from(ONLINE), st.integers(4, 30), st.sampled_from([1, 3, 8]))
@settings(max_examples=25, deadline=None)
def test_no_policy_is_above_the_step_ceiling(policy, budget, page_size):
    toy = dense_trace([random_source(7)], Geometry(2, 2, 2, 16, **SIZES))
    try:
        r = run(toy, policy=policy, budget=str(budget), page_size=page_size)
    except ConfigError:  # a budget below what the policy protects
        return
    if "lazy" not in policy:  # decides late and declares the overshoot
        assert (r.tables["steps"]["attended"] <= r.tables["steps"]["ceiling"] * (1 + 1e-5) + 1e-6)[1:].all()


def test_a_faster_link_never_makes_a_run_longer(trace):
    base = {
        "policy": "lru",
        "budget": "20%",
        "page_size": 1,
        "regime": "offload",
        "model": "llama-3.1-8b",
        "concurrency": 3,
    }
    slow = run(trace, **base, constants={"link.h2d.bandwidth": "1GB/s"})
    fast = run(trace, **base, constants={"link.h2d.bandwidth": "2GB/s"})
    assert fast.summary["end_s"] < slow.summary["end_s"]
    assert fast.summary["fetched_host_bytes"] == slow.summary["fetched_host_bytes"]
    assert slow.stall_share > fast.stall_share > 0


def test_time_does_not_change_what_the_cache_decides(trace):
    a = run(trace, policy="h2o", budget="30%", hardware="h100-pcie5")
    b = run(trace, policy="h2o", budget="30%", hardware="rtx4090-pcie4", model="llama-3.1-8b", concurrency=3)
    assert a.recall == b.recall and a.summary["end_s"] != b.summary["end_s"]
    assert np.allclose(a.lanes, b.lanes)


def test_concurrency_shares_the_machine(trace):
    one = run(trace, policy="full", model="llama-3.1-8b")
    three = run(trace, policy="full", model="llama-3.1-8b", concurrency=3)
    assert three.summary["end_s"] < one.summary["end_s"]  # weights are read once for three
    assert three.tpot_p50_s > one.tpot_p50_s


def test_the_same_run_is_the_same_bytes(trace, tmp_path):
    for name in ("a", "b"):
        run(trace, policy="random", budget="30%", seed=3).save(tmp_path / name)
    for file in ("manifest.json", *(f"{t}.parquet" for t in TABLES)):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert run(trace, policy="random", budget="30%", seed=4).id != run(trace, policy="random", budget="30%", seed=3).id


def test_a_result_comes_back_whole(trace, tmp_path):
    r = run(trace, policy="h2o", budget="30%")
    again = open_result(r.save(tmp_path / "r"))
    assert again.summary == json.loads(json.dumps(r.summary))
    assert list(again.steps.columns) == list(STEPS)
    assert again.steps.equals(r.steps) and again.requests.equals(r.requests)


def test_what_is_not_a_result_is_never_replaced(trace, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ResultError, match="not a kvsim result"):
        run(trace, policy="lru", budget="30%").save(mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    (tmp_path / "half").mkdir()
    with pytest.raises(ResultError, match="not a result folder"):
        open_result(tmp_path / "half")


def test_budgets_in_three_units_agree(trace):
    pages = 11
    share = run(trace, policy="lru", budget="25%")  # 25 % of 44 tokens
    count = run(trace, policy="lru", budget=str(pages))
    size = run(trace, policy="lru", budget=f"{pages * 4 * 64}B")  # 4 lanes, 64 bytes per page
    assert share.recall == count.recall == size.recall
    assert {r.manifest["budget_basis"] for r in (share, count, size)} == {
        "of each request's final length", "per lane", "over all lanes",
    }  # fmt: skip
    assert share.manifest["budget_bytes"] == pages * 4 * 64


def test_a_budget_above_the_need_is_the_full_cache_and_is_noted_once(trace):
    r = run(trace, policy="lru", budget="1000")
    assert r.recall == pytest.approx(1, abs=1e-6)
    assert sum("fit into the budget whole" in n for n in r.manifest["notes"]) == 1


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        ({"policy": "h20"}, PolicyError, 'did you mean "h2o"'),
        ({"policy": "h2o(recnt=3)"}, PolicyError, 'no parameter "recnt"'),
        ({"budget": "0"}, ConfigError, "keeps nothing"),
        ({"budget": "-5"}, ConfigError, "keeps nothing"),
        ({"budget": "1%"}, ConfigError, "less than one page"),
        ({"budget": "3 apples"}, ConfigError, "apples"),
        ({"policy": "streaming-llm(sink=8)", "budget": "5"}, ConfigError, "raise the budget"),
        ({"regime": "lossless"}, ConfigError, "regime"),
        ({"regime": "lossy", "offload": "spill"}, ConfigError, "contradicts"),
        ({"regime": "lossy", "demand": "topk(3)"}, ConfigError, "no meaning"),
        ({"demand": "psychic"}, ConfigError, "unknown demand"),
        ({"demand": "select", "policy": "lru", "page_size": 1}, ConfigError, "read set"),
        ({"hardware": "h100-pcie"}, ConfigError, "h100-pcie5"),
        ({"constants": {"link.h2d.bandwidht": "1GB/s"}}, ConfigError, "bandwidth"),
        ({"model": "no-such-model"}, ConfigError, "llama-3.1-8b"),
        ({"requests": [99]}, TraceError, "no request 99"),
        ({"concurrency": 0}, ConfigError, "concurrency"),
        ({"page_size": 0}, ConfigError, "page_size"),
        ({"colour": "red"}, ConfigError, "colour"),
        (
            {"regime": "offload", "host": "100B", "ssd": "0B", "budget": "4", "page_size": 1},
            ConfigError,
            "raise --host",
        ),
        ({"policy": "h2o(recent='half')"}, ConfigError, "half"),
        ({"use": "weight(-1)"}, ConfigError, "above zero"),
    ],
)
def test_bad_settings_say_what_would_be_right(trace, keys, error, says):
    with pytest.raises(error) as caught:
        run(trace, **keys)
    assert isinstance(caught.value, KvsimError)
    assert says in str(caught.value)


def test_a_model_the_trace_does_not_describe_is_not_invented():
    bare = dense_trace([random_source(0)], Geometry(2, 2, 2, 16))
    with pytest.raises(ConfigError, match="hidden"):
        run(bare, policy="lru")
    assert run(bare, policy="lru", model="llama-3.2-1b").recall > 0


def test_a_what_if_model_moves_its_own_bytes(trace, tmp_path):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 512,
        "vocab_size": 1000,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = run(trace, policy="lru", budget="20%", regime="offload", page_size=1)
    other = run(trace, policy="lru", budget="20%", regime="offload", page_size=1, model=str(tmp_path / "config.json"))
    ratio = (4 * 4 * 32) / (2 * 2 * 16)  # layers x heads x head_dim
    assert other.summary["fetched_host_bytes"] == own.summary["fetched_host_bytes"] * ratio
    assert any("what-if" in n for n in other.manifest["notes"])


def test_bytes_on_the_link_are_the_bytes_of_the_steps(trace):
    r = run(trace, policy="h2o", budget="30%", page_size=2, regime="offload", concurrency=2)
    links = r.links.set_index(["link", "direction"])["bytes"]
    assert links["pcie", "h2d"] == pytest.approx(r.steps["fetched_host_bytes"].sum())
    assert links["pcie", "d2h"] == pytest.approx(r.steps["spilled_host_bytes"].sum())


def test_an_edited_hardware_file_or_offload_policy_is_another_run(trace, tmp_path):
    from kvsim.machine import Hardware

    file, plug_in = tmp_path / "my.toml", tmp_path / "away.py"
    text = (
        "from kvsim import offload\n\n@offload('away')\nclass Away:\n    'Down.'\n    def place(self, view, victims):\n"
    )
    ids = set()
    for bandwidth, tier in (("50GB/s", 1), ("1GB/s", 1), ("1GB/s", 2)):
        file.write_text(Hardware.load("h100-pcie5").with_overrides({"link.h2d.bandwidth": bandwidth}).to_toml())
        plug_in.write_text(text + f"        return {tier}\n")
        keys = {"policy": "lru", "budget": "30%", "page_size": 1, "hardware": str(file), "offload": str(plug_in)}
        ids.add(run(trace, **keys).id)
    assert len(ids) == 3


def test_the_last_step_ends_a_request_whoever_runs_on():
    sources = [random_source(1, steps=4), random_source(2, steps=20)]
    r = run(dense_trace(sources, Geometry(2, 2, 2, 16, **SIZES)), policy="full", concurrency=2)
    last = r.steps.groupby("request")["end_s"].max()
    assert (r.requests.set_index("request")["finish_s"] == last).all()


def test_choosing_costs_time_only_where_something_can_leave(trace):
    base = {"model": "llama-3.1-8b", "concurrency": 3}
    full, idle, busy = (
        run(trace, policy=p, budget=b, **base) for p, b in (("full", "50%"), ("lru", "100%"), ("lru", "50%"))
    )
    assert idle.tpot_p50_s == full.tpot_p50_s < busy.tpot_p50_s
    one = run(trace, policy="lru", budget="50%", model="llama-3.1-8b")
    assert busy.tpot_p50_s - full.tpot_p50_s < 1.5 * (
        one.tpot_p50_s - run(trace, policy="full", model="llama-3.1-8b").tpot_p50_s
    )


def test_steps_and_links_agree_on_bytes_for_a_what_if_model(trace):
    r = run(trace, policy="lru", budget="30%", regime="offload", page_size=1, model="qwen2.5-7b")  # 28 layers for 2
    links = r.links.set_index(["link", "direction"])["bytes"]
    assert links["pcie", "h2d"] == pytest.approx(r.steps["fetched_host_bytes"].sum(), rel=1e-12)


def test_peak_memory_counts_the_prompt_and_everything_that_runs(trace):
    page = 2 * 2 * 64  # layers, heads, bytes of one token in one lane
    one = run(trace, policy="lru", budget="10")
    assert one.summary["peak_bytes"] == 24 * page  # the prompt, before it is cut
    assert run(trace, policy="full", concurrency=3).summary["peak_bytes"] == 3 * 44 * page
    tiny = run(trace, policy="full", constants={"gpu.memory": "1kB"})
    assert "more than the GPU's" in tiny.manifest["warnings"][0]


def test_requests_wait_until_the_memory_they_may_need_is_free(trace):
    """Three requests of 44 pages; memory for two of them, and then for less than one."""
    page = 2 * 2 * 64
    settings = {"policy": "full", "concurrency": 3}
    weights = prepare(trace, run_config(settings)).shape.weight_bytes
    for pages, together in ((132, 3), (131, 2), (88, 2), (87, 1), (40, 1)):
        r = run(trace, **settings, constants={"gpu.memory": f"{weights + pages * page}B"})
        assert r.summary["running_peak"] == together
        assert r.summary["peak_bytes"] == min(3, together) * 44 * page
        assert any("waited for memory" in note for note in r.manifest["notes"]) == (together < 3)
        assert bool(r.manifest["warnings"]) == (pages < 44)
    late = run(trace, **settings, constants={"gpu.memory": f"{weights + 88 * page}B"}).requests
    first = late.set_index("request")
    assert first["admitted_s"].max() == first["finish_s"].min()  # the third starts when the first has ended


@pytest.mark.parametrize("policy", ["full", "lru", "h2o", "lazy-eviction(window=10)", "streaming-llm", "belady"])
@pytest.mark.parametrize("regime", [{}, {"regime": "offload", "page_size": 2}])
def test_a_request_never_holds_more_than_it_reserved(trace, policy, regime):
    if regime and policy.startswith("lazy"):
        regime = {**regime, "page_size": 1}
    setting = prepare(trace, run_config({"policy": policy, "budget": "40%", **regime}))
    replays = [Replay(setting, request) for request in setting.trace.requests()]
    steps = run(trace, policy=policy, budget="40%", **regime).steps
    for replay in replays:
        mine = steps[steps["request"] == replay.request.id]
        before = replay.reserves()["gpu"]
        _, first = next(iter(replay))
        after = replay.reserves(float(first.resident.mean()))["gpu"]
        assert after <= before and mine["held_bytes"].max() <= before * (1 + 1e-12)
        assert mine[mine["step"] > 0]["held_bytes"].max() <= after * (1 + 1e-12)


def test_a_small_budget_lets_more_requests_run(trace):
    """Prompts of 24 pages are read one at a time; what is left of each is 11, and a step may add a page to either."""
    page = 2 * 2 * 64
    settings = {"policy": "lru", "budget": "11", "concurrency": 3}
    weights = prepare(trace, run_config(settings)).shape.weight_bytes
    for pages, together in ((12 + 12 + 25, 3), (12 + 12 + 24, 2), (12 + 25, 2), (12 + 24, 1)):
        r = run(trace, **settings, constants={"gpu.memory": f"{weights + pages * page}B"})
        assert r.summary["running_peak"] == together and not r.manifest["warnings"]
    assert run(trace, **settings).summary["peak_bytes"] == (11 + 11 + 24) * page  # the third prompt beside two caches


def test_a_policy_may_ask_what_the_trace_knows_of_each_page(tmp_path):
    source = random_source(1)
    source.facts["expiry"] = np.arange(100.0, 100.0 + 44)
    source.facts["short"] = np.arange(3)
    trace = dense_trace([source], Geometry(2, 2, 2, 16, **SIZES))
    plug = tmp_path / "soon.py"
    plug.write_text(
        "from kvsim import policy\n\n\n@policy('soon')\nclass Soon:\n    'Keeps what expires last.'\n\n"
        "    name: str = 'expiry'\n\n    def score(self, view):\n        assert (view.size == 1).all()\n"
        "        assert view.pins.sum() == (4 if view.tokens % view.page_size else 0)\n"
        "        return view.fact(self.name)\n"
    )
    base = {"budget": "25%", "page_size": 4, "regime": "offload"}
    soon, newest = run(trace, policy=str(plug), **base), run(trace, policy="streaming-llm(sink=0)", **base)
    assert (soon.steps["hit"] == newest.steps["hit"]).all()  # later keys expire later
    with pytest.raises(PolicyError, match='does not know the fact "short"') as bad:
        run(trace, policy=f"{plug}(name='short')", **base)
    assert "expiry" in str(bad.value)


def test_a_lagged_policy_is_not_above_what_it_was_allowed_to_hold(trace):
    r = run(trace, policy="lazy-eviction(window=10)", budget="14")
    assert (r.steps["attended"] <= r.steps["ceiling"] * (1 + 1e-5) + 1e-6)[r.steps["step"] > 0].all()


def test_another_run_is_not_replaced(trace, tmp_path):
    run(trace, policy="lru", budget="30%").save(tmp_path / "r")
    run(trace, policy="lru", budget="30%").save(tmp_path / "r")  # the same one is
    with pytest.raises(ResultError, match="another run"):
        run(trace, policy="h2o", budget="30%").save(tmp_path / "r")


def test_comparable_rows_share_a_bound(trace):
    grid = kvsim.sweep(trace, policy=["lru", "belady"], budget=["40%"], page_size=[1, 11])
    text = "\n".join(grid.verdicts())
    assert "page_size=1:" in text and "page_size=11:" in text
    ceilings = {line[0]: line[1] for line in grid.table_lines() if "ceiling" in line[0]}
    assert len(set(ceilings.values())) == 2


def test_an_offload_policy_that_looks_ahead_runs_from_its_file(trace, tmp_path):
    (tmp_path / "ahead.py").write_text(
        "import numpy as np\nfrom kvsim import offload\n\n@offload('ahead')\nclass Ahead:\n    'Heaviest first.'\n"
        "    def place(self, view, victims):\n        return 1\n"
        "    def prefetch(self, view):\n        away = np.where(view.resident | (view.key < 0), -np.inf, view.mass)\n"
        "        return away == away.max(-1, keepdims=True)\n"
    )
    keys = {"policy": "h2o(recent=1)", "budget": "30%", "page_size": 1, "demand": "theta", "model": "llama-3.1-8b"}
    r = run(trace, offload=str(tmp_path / "ahead.py"), **keys)
    links = r.links.set_index(["link", "direction"])["bytes"]
    ahead, waited = r.summary["prefetched_host_bytes"], r.summary["fetched_host_bytes"]
    assert ahead > 0 and links["pcie", "h2d"] == pytest.approx(ahead + waited, rel=1e-12)


def test_a_small_host_overflows_to_the_ssd(trace):
    lanes_page = 4 * 64
    r = run(
        trace,
        policy="lru",
        budget="8",
        regime="offload",
        demand="theta",
        page_size=1,
        host=f"{12 * lanes_page}B",
        ssd="1MB",
    )
    assert r.summary["spilled_ssd_bytes"] > 0 and r.summary["fetched_ssd_bytes"] > 0
    assert r.recall == pytest.approx(1, abs=0.2) and r.steps["dropped_pages"].sum() == 0


def test_layer_granularity_decides_once_for_all_heads(trace):
    setting = prepare(trace, run_config({"policy": "h2o", "budget": "30%", "granularity": "layer"}))
    replay = Replay(setting, setting.trace.requests()[0], audit=True)
    for _ in replay:
        pass
    assert replay.cache.shape == (2, 1)
    assert replay.cache.table.key.shape[0] == 2


def test_settings_and_their_types():
    assert parse_settings(["budget=20%", "seed=3", "hardware.link.h2d.bandwidth=50GB/s", "requests=[1, 2]"]) == {
        "budget": "20%", "seed": 3, "hardware.link.h2d.bandwidth": "50GB/s", "requests": [1, 2],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="--set"):
        parse_settings(["budget"])
    assert RunConfig(budget=0.5).budget == "0.5"


def test_resolved_configuration_runs_again_as_the_same_run(trace):
    first = run(trace, policy="lru", budget="50%", regime="offload")
    again = run(trace, run_config(first.manifest["config"]))
    assert again.id == first.id and again.summary == pytest.approx(first.summary, rel=0, nan_ok=True)


def test_a_user_policy_in_one_file(trace, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from kvsim import policy\n\n@policy('mine')\nclass Mine:\n    '''Keeps the even keys.'''\n"
        "    def score(self, view):\n        return view.key % 2 == 0\n"
    )
    r = run(trace, policy=f"{file}(recent=2)", budget="50%")
    assert r.manifest["policy"]["name"] == "mine" and 0 < r.recall < 1
    file.write_text(file.read_text().replace("== 0", "== 1"))
    assert run(trace, policy=f"{file}(recent=2)", budget="50%").id != r.id


def test_a_policy_that_is_edited_meanwhile_is_recorded_as_it_ran(trace, tmp_path):
    text = (
        "from kvsim import policy\n\n@policy('own')\nclass Own:\n    def score(self, view):\n        return view.last\n"
    )
    (path := tmp_path / "own.py").write_text(text)
    calm = run(trace, policy=str(path), budget="30%")

    def edit(done, total):
        if done == total:
            path.write_text(text.replace("last", "key"))

    edited = run(trace, policy=str(path), budget="30%", progress=edit)
    assert edited.manifest["source"] == calm.manifest["source"] and edited.id == calm.id
    assert run(trace, policy=str(path), budget="30%").manifest["source"] != calm.manifest["source"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return view.key * float('nan')", "NaN"),
        ("return view.key.sum(-1)", "shape"),
        ("view.mass[:] = 0; return view.key", "read-only"),
        ("return 1 / 0", "ZeroDivisionError"),
        ("return 'high'", "numbers are expected"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_named(trace, tmp_path, body, says):
    file = tmp_path / "broken.py"
    file.write_text(
        f"from kvsim import policy\n\n@policy('broken')\nclass Broken:\n    def score(self, view):\n        {body}\n"
    )
    with pytest.raises(PolicyError) as caught:
        run(trace, policy=str(file), budget="30%")
    assert says in str(caught.value) and "broken.py" in str(caught.value)


def test_pages_and_pools_keep_the_mass(trace):
    for view in (trace.paged(5), trace.pooled("layer"), trace.pooled("token").paged(3)):
        for request in view.requests():
            for a in request.accesses():
                assert a.row.sum() == pytest.approx(np.prod(view.lanes), rel=1e-5)
                assert (a.peak <= a.row + 1e-6).all()


def test_public_names_are_documented_and_loaded_when_asked_for():
    for name in {*kvsim.__all__} - {"__version__"}:
        assert getattr(kvsim, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        kvsim.walk  # noqa: B018
    heavy = "{'numpy', 'pyarrow', 'numba', 'pandas', 'simpy', 'pydantic'}"
    script = f"import sys, kvsim; assert not {heavy} & set(sys.modules); kvsim.run; print('simpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("text", ["[1, 2]", "{}", '"a run"', "null", "not JSON"])
def test_a_manifest_that_is_none_of_ours_is_left_alone(trace, tmp_path, text):
    (folder := tmp_path / "out").mkdir()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ResultError, match="not a kvsim result"):
        run(trace, policy="full").save(folder)
    assert (folder / "manifest.json").read_text() == text


def test_a_result_whose_manifest_is_a_list_is_none(trace, tmp_path):
    folder = run(trace, policy="full").save(tmp_path / "r")
    (folder / "manifest.json").write_text("[1, 2]")
    with pytest.raises(ResultError, match="result schema None"):
        open_result(folder)
